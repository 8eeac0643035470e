"""Images and prompts -> model inputs: `geometry` (pure arithmetic), `image` and `resample` (bytes -> uint8
tiles), `pixels` (tiles -> normalised views, torch), `prompt` and `tokenizer` (messages -> ids and labels),
`processing` (the published processor). Knows nothing of the model.
"""
