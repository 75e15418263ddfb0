"""Published head formats: the tensors' names, the config's fields and the meaning of layer ids, for
each engine.

`eagle` is SafeAILab/EAGLE's (and this package's own), `sglang` SpecForge's, `vllm` speculators',
`modelopt` NVIDIA ModelOpt's. Knows names, shapes and JSON fields; knows nothing of training or
text."""
