"""The plugin `gpt-oss-attention`: for models with sinks, the fastest backend for each kind of layers."""
