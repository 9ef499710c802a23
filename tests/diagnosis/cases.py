"""Logs that cannot be provoked without a GPU, a gated model or two machines: in the words of the libraries' sources."""

# ruff: noqa: E501 (the lines of logs are as long as they are)

from __future__ import annotations

TRACEBACK = """Traceback (most recent call last):
  File "/home/user/job/train.py", line 31, in <module>
    trainer.train()
  File "/venv/lib/python3.11/site-packages/transformers/trainer.py", line 3036, in training_step
    {source}
  File "/venv/lib/python3.11/site-packages/torch/{file}", line 133, in {function}
    {source}
{error}
"""


def raised(error: str, *, file: str = "nn/modules/module.py", function: str = "_call_impl", source: str = "x()") -> str:
    """A traceback through the Trainer that ends in ``error``."""
    return TRACEBACK.format(error=error, file=file, function=function, source=source)


GPU_OUT_OF_MEMORY = raised(
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 226.00 MiB. GPU 0 has a total capacity of 23.65 GiB "
    "of which 210.38 MiB is free. Process 4242 has 3.00 GiB memory in use. Including non-PyTorch memory, this process "
    "has 20.40 GiB memory in use. Of the allocated memory 19.10 GiB is allocated by PyTorch, and 336.73 MiB is reserved "
    "by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.",
    file="autograd/graph.py",
    function="_engine_run_backward",
    source="return Variable._execution_engine.run_backward(",
)
NCCL_TIMEOUT = """
[rank0]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout: \
WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, Timeout(ms)=600000) ran for 600060 \
milliseconds before timing out.
[rank0]:[E321 02:07:08.465148152 ProcessGroupNCCL.cpp:1664] [PG 1 Rank 0] Exception (either an error or timeout) \
detected by watchdog at work: 1580, last enqueued NCCL work: 1582, last completed NCCL work: 1579.
terminate called after throwing an instance of 'c10::DistBackendError'
"""
NCCL_INTERFACE = """
[rank0]: Traceback (most recent call last):
[rank0]:   File "/home/user/job/train.py", line 12, in <module>
[rank0]:     dist.barrier()
[rank0]: torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:\
2588, internal error - please report this issue to the NCCL developers, NCCL version 2.21.5
[rank0]: ncclInternalError: Internal check failed.
[rank0]: Last error:
[rank0]: Bootstrap : no socket interface found
"""
DEVICE_ASSERT = """
../aten/src/ATen/native/cuda/Indexing.cu:1292: indexSelectLargeIndex: block: [223,0,0], thread: [96,0,0] Assertion \
`srcIndex < srcSelectDimSize` failed.
../aten/src/ATen/native/cuda/Indexing.cu:1292: indexSelectLargeIndex: block: [223,0,0], thread: [97,0,0] Assertion \
`srcIndex < srcSelectDimSize` failed.
Traceback (most recent call last):
  File "/home/user/job/train.py", line 31, in <module>
    trainer.train()
RuntimeError: CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1.
"""
CPU_ADAM = (
    raised(
        "deepspeed.ops.op_builder.builder.CUDAMismatchException: >- DeepSpeed Op Builder: Installed CUDA version 12.2 does "
        "not match the version torch was compiled with 11.7, unable to compile cuda/cpp extensions without a matching cuda "
        "version."
    )
    + """Exception ignored in: <function DeepSpeedCPUAdam.__del__ at 0x7f30c6ca0830>
Traceback (most recent call last):
  File "/venv/lib/python3.11/site-packages/deepspeed/ops/adam/cpu_adam.py", line 91, in __del__
    self.ds_opt_adam.destroy_adam(self.opt_id)
AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'
"""
)
GATED = (
    raised(
        """huggingface_hub.errors.GatedRepoError: 403 Client Error.

Cannot access gated repo for url https://huggingface.co/meta-llama/Llama-3.1-8B/resolve/main/config.json.
Access to model meta-llama/Llama-3.1-8B is restricted and you are not in the authorized list."""
    )
    + """
The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/home/user/job/train.py", line 9, in <module>
    model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B")
OSError: You are trying to access a gated repo.
Make sure to have access to it at https://huggingface.co/meta-llama/Llama-3.1-8B.
403 Client Error. (Request ID: Root=1-1)

Cannot access gated repo for url https://huggingface.co/meta-llama/Llama-3.1-8B/resolve/main/config.json.
"""
)
SHM = raised(
    "RuntimeError: DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit."
)
RICH = """╭─────────────── Traceback (most recent call last) ────────────────╮
│ /home/user/job/train.py:31 in <module>                           │
│ ❱ 31 │   trainer.train()                                         │
╰──────────────────────────────────────────────────────────────────╯
RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!
"""

# The rule that each is known by, in the order of the rules.
CASES = (
    ("gpu-memory", GPU_OUT_OF_MEMORY),
    ("gpu-memory", raised("torch.AcceleratorError: CUDA error: out of memory")),
    ("position-out-of-range", raised("RuntimeError: CUDA error: device-side assert triggered", source="self.wpe(ids)")),
    ("token-out-of-range", DEVICE_ASSERT),
    ("device-assert", raised("RuntimeError: CUDA error: device-side assert triggered")),
    ("no-kernel-for-gpu", raised("RuntimeError: CUDA error: no kernel image is available for execution on the device")),
    ("driver-too-old", raised("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).")),
    ("no-gpu", raised("RuntimeError: No CUDA GPUs are available")),
    ("more-ranks-than-gpus", raised("torch.AcceleratorError: CUDA error: invalid device ordinal")),
    ("gpu-busy", raised("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable")),
    ("gpu-hardware", raised("RuntimeError: CUDA error: uncorrectable ECC error encountered")),
    ("illegal-access", raised("RuntimeError: CUDA error: an illegal memory access was encountered")),
    ("cuda-in-fork", raised("RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA with …")),
    ("shared-memory", SHM),
    ("nccl-interface", NCCL_INTERFACE),
    (
        "nccl-connect",
        raised("torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:1333, unhandled system error\n"
               "Last error:\nsocketStartConnect: Connect to 192.168.19.14<52822> failed : No route to host"),
    ),
    ("infiniband-memlock", raised("torch.distributed.DistBackendError: NCCL error\nLast error:\nCall to ibv_create_cq failed")),
    (
        "rendezvous",
        raised("torch.distributed.DistStoreError: Timed out after 901 seconds waiting for clients. 1/2 clients joined."),
    ),
    ("collective-timeout", NCCL_TIMEOUT),
    ("peer-lost", raised("torch.distributed.DistBackendError: NCCL error\nncclRemoteError: A call failed possibly due to …")),
    ("nccl", raised("torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:77, invalid usage")),
    ("host-memory", "train.sh: line 3:  4242 Killed                  python train.py\n"),
    ("threads", raised("RuntimeError: can't start new thread")),
    ("disk-quota", raised("OSError: [Errno 122] Disk quota exceeded: '/home/user/.cache/huggingface'")),
    ("not-writable", raised("PermissionError: [Errno 13] Permission denied: '/data/out'")),
    ("no-nvcc", raised("deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)")),
    ("cuda-mismatch", CPU_ADAM),
    ("no-ninja", raised("RuntimeError: Ninja is required to load C++ extensions (pip install ninja to get it)")),
    ("no-python-headers", raised("RuntimeError: Error building extension 'cpu_adam': /x.h:12:10: fatal error: Python.h: No such file")),
    ("extension-build", raised("RuntimeError: Error building extension 'fused_adam': [1/3] nvcc fused_adam.cu\nFAILED: x.o")),
    ("loss-scale", raised("Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")),
    (
        "deepspeed-batch",
        raised("AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
               "gradient_acc_step * world_size 4 != 2 * 2 * 2"),
    ),
    (
        "deepspeed-mismatch",
        raised("ValueError: Please correct the following DeepSpeed config values that mismatch TrainingArguments values:\n"
               "- ds gradient_accumulation_steps=1 vs hf gradient_accumulation_steps=4"),
    ),
    ("fsdp-wrap-class", raised("ValueError: Could not find the transformer layer class LlamaDecoderLayer in the model.")),
    ("ddp-twice", raised("RuntimeError: Expected to mark a variable ready only once. This error is caused by …")),
    (
        "checkpoint-recompute",
        raised("torch.utils.checkpoint.CheckpointError: torch.utils.checkpoint: A different number of tensors was saved "
               "during the original forward and recomputation."),
    ),
    ("gated-model", GATED),
    ("hub-token", raised("huggingface_hub.errors.HfHubHTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/api/whoami")),
    (
        "sequence-too-long",
        raised("RuntimeError: The expanded size of the tensor (600) must match the existing size (512) at non-singleton "
               "dimension 1."),
    ),
    (
        "rows-of-different-length",
        raised("ValueError: Unable to create tensor, you should probably activate truncation and/or padding with …"),
    ),
    ("devices", RICH),
    ("compile", raised("torch._dynamo.exc.InternalTorchDynamoError: AttributeError: x")),
    ("bitsandbytes-without-gpu", raised("RuntimeError: No GPU found. A GPU is needed for quantization.")),
    ("binary-mismatch", raised("ImportError: /venv/flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E")),
    ("missing-name", raised("ImportError: cannot import name 'HybridCache' from 'transformers' (/venv/…/__init__.py)")),
    ("needs-package", raised("ImportError: LlamaTokenizer requires the SentencePiece library but it was not found.")),
    ("arguments", "usage: train.py [-h] [--lr LR]\ntrain.py: error: unrecognized arguments: --local_rank=0\n"),
)  # fmt: skip
