"""The ground floor of the house: what every package may import. It knows no shards, no models, no torch."""
