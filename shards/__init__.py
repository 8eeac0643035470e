"""From images and prompts to WebDataset tar shards with a byte-exact index. No torch, no model knowledge.

The rooms: `format` (what a dataset directory is; the only file the training side imports), `sample` (a drawn
product catalogue to try everything on), `sources` and `rows` (tables, folders, conversations: rows), `fetch`
(bytes from URLs and paths), `images` (are those bytes an image?), `prepare` (a row with its images), `tars`,
`window`, `worker`, `build` (rows -> shards, by one worker or many), `place` (a directory or an object store),
`ledger` (what became of every row), `options` and `recipes` (how to build), `index` (foreign tars -> index),
`verify`, `inspect` and `page` (look at it).
"""
