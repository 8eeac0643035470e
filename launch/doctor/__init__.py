"""`phi3v doctor`: checks of this machine, a run and a cluster, each with the way to fix what is wrong."""
