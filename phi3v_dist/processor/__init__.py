"""Pictures and prompts -> what the model eats: `geometry` (pure), `image`, `prompt`, `tokenizer`,
`processing`.
"""
