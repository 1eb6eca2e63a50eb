"""What a run needs and how long its steps should take, on GPUs that need not be here:
python -m train plan d38-256 --gpus 64 --gpu h100

Memory by component from shapes alone, activations from tracing a step on fake tensors, time from the roofline: every
kernel takes what its FLOPs or bytes demand at stated shares of a data sheet, or what was measured. Communication is put
beside the computation, not on top: FSDP overlaps them where it can.
"""
