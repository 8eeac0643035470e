"""From images and prompts to WebDataset tar shards with a byte-exact index. No torch, no model knowledge.

The rooms: `format` (what a dataset directory is; the only file the training side imports), `sample` (a drawn
product catalogue to try everything on), `fetch` (bytes from URLs and paths), `images` (are those bytes an
image?), `sources` (tables and messages -> rows), `build` (rows -> shards), `index` (foreign tars -> index),
`verify`, `inspect`.
"""
