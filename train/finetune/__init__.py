"""Fine-tuning with quantized low-rank adapters: supervised, multi-task, by preference; and merging.

The trainers are those of transformers and TRL; what is here is the data, the safety of what is
written, and what they leave out.
"""
