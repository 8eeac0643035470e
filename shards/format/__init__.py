"""The shard format, version 1: names and version, records, messages, the index.

With `shards.common` this is all that training takes from `shards`.
"""
