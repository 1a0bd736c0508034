"""The pipeline: one stage a file, and the channel and pipeline that join them."""
