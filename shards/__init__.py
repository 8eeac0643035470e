"""From images and prompts to WebDataset tar shards with a byte-exact index. No torch, no model knowledge.

What is where: `common` (files, locks, errors for the whole house), `format` (what a dataset directory is;
with `common` all that training imports), `sample` (a generated product catalogue to try everything with),
`sources` and `source_records` (tables, folders, conversations: records), `fetch` (bytes from URLs and paths),
`images` (is it a usable image?), `prepare` (a record with its images), `tars`, `partition` and `ledger` (what
a build writes), `worker` and `process_pool` (who writes it), `storage` (a directory or an object store),
`claim` (who may build there), `build` and `finish` (records -> shards -> dataset.json), `options` and
`recipes` (how to build), `index` with `index_samples` and `index_parts` (tars of another program -> index),
`verify`, `inspect` and `page` (look at a dataset).
"""
