"""The shard format, version 1: what a dataset directory holds, and how it is read.

Together with `shards.common`, this package is all that `phi3v_dist` may import from `shards`:

    dataset    names of files, dataset.json (`DatasetInfo`, `ShardInfo`, `read_dataset_info`)
    index      INDEX_SCHEMA, `read_index`, and tables to records and back
    records    `SampleRecord`, `ImageRef`, `Message`: one sample without its pixels
    messages   the rules that the messages of a sample must follow (`check_messages`)
    phi3       the few facts about Phi-3-Vision on which those rules depend

How sources are read, images fetched and tars written is not part of the format.
"""
