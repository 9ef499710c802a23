"""The causes that are known, one row each: what a log says, what that means, what to type next.

A row's ``source`` is the file that prints the text, read in torch 2.13, transformers 5.23, accelerate 1.15, DeepSpeed
0.19.8, PEFT 0.21, bitsandbytes 0.50 and datasets 5; what only a GPU prints is NCCL's and the CUDA runtime's own. The
first row that matches wins: what is special stands before what is general.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One cause. ``pattern`` is searched in an error's whole text, ``code`` (where given) in the lines of the program
    that led to it. Named groups of the pattern fill ``{name}`` in the texts.

    ``fact`` finishes the sentence "rank 1 failed first: …". ``is_echo`` marks what a rank says when another one
    died or hangs: the cause only where no rank says anything better.
    """

    name: str
    pattern: re.Pattern[str]
    fact: str
    meaning: str = ""
    advice: tuple[str, ...] = ()
    source: str
    code: re.Pattern[str] | None = None
    is_echo: bool = False


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A rule with its texts filled in."""

    name: str
    fact: str
    meaning: str = ""
    advice: tuple[str, ...] = ()
    is_echo: bool = False
    details: Mapping[str, str] = field(default_factory=dict)


def _re(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.MULTILINE)


# What is not installed under its own name. Extras are those of pyproject.toml.
INSTALL = {
    "accelerate": "'launchkit-planner[train]'",
    "bitsandbytes": "'launchkit-planner[qlora]'",
    "datasets": "'launchkit-planner[train]'",
    "deepspeed": "'launchkit-planner[deepspeed]'",
    "flash_attn": "flash-attn --no-build-isolation",
    "gguf": "'launchkit-planner[train]'",
    "liger_kernel": "liger-kernel",
    "peft": "'launchkit-planner[train]'",
    "torchao": "'launchkit-planner[fp8]'",
    "transformers": "'launchkit-planner[train]'",
    "trl": "'launchkit-planner[train]'",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}
SMALLER_STEP = (
    "a smaller --micro-batch or --seq-len, or --checkpointing full",
    "launchkit plan MODEL says what fits these GPUs",
)
LESS_HOST_MEMORY = ("fewer processes, a smaller --seq-len, or no --offload",)
OTHER_DATA = ("--data FILE.jsonl with one JSON object per line: messages, prompt + completion, or text",)
NCCL_DEBUG = "NCCL_DEBUG=INFO before the command says which step hangs"

RULES = (
    # GPU memory
    Rule(
        name="gpu-memory",
        pattern=_re(
            r"(?:CUDA|HIP|XPU|MPS backend) out of memory",
            r"OutOfMemoryError",
            r"CUDA error: out of memory",
            r"CUBLAS_STATUS_ALLOC_FAILED",
            r"NCCL.*(?:Cuda failure|Failed to CUDA \w+).*out of memory",
        ),
        fact="out of GPU memory",
        advice=SMALLER_STEP,
        source="torch c10/cuda/CUDACachingAllocator.cpp",
    ),
    # The GPU and its driver
    Rule(
        name="position-out-of-range",
        pattern=_re("index out of range in self", "srcIndex < srcSelectDimSize", "device-side assert triggered"),
        code=_re(r"\bwpe\(", r"position_embed\w*\(", r"embed_positions\("),
        fact="a sequence is longer than the model has positions",
        meaning="The model looks positions up in a table, and a row has more tokens than the table.",
        advice=("a --seq-len of at most the model's max_position_embeddings",),
        source="torch ATen/native/Embedding.cpp, ATen/native/cuda/Indexing.cu; transformers models/gpt2",
    ),
    Rule(
        name="token-out-of-range",
        pattern=_re("index out of range in self", r"srcIndex < srcSelectDimSize", r"indexSelect\w+Index.*Assertion"),
        fact="a token id is beyond the model's embedding table",
        meaning="The tokenizer has more tokens than the model, often an added padding token. On a GPU the traceback "
        "points at a later line.",
        advice=(
            "the tokenizer that belongs to the model, or model.resize_token_embeddings(len(tokenizer))",
            "CUDA_LAUNCH_BLOCKING=1 before the command makes the traceback point at the right line",
        ),
        source="torch ATen/native/Embedding.cpp, ATen/native/cuda/Indexing.cu",
    ),
    Rule(
        name="target-out-of-range",
        pattern=_re(
            r"Target (?P<target>-?\d+) is out of bounds",
            r"t >= 0 && t < n_classes",
            r"cur_target >= 0 && cur_target < n_classes",
        ),
        fact="a label is no class of the model's",
        meaning="Labels count from 0 to the number of classes (or the vocabulary) less one; -100 is ignored.",
        advice=("num_labels=N where the model is loaded, or labels that fit it",),
        source="torch ATen/native/LossNLL.cpp, ATen/native/cuda/Loss.cu",
    ),
    Rule(
        name="device-assert",
        pattern=_re("device-side assert triggered", r"\.cu:\d+:.*Assertion"),
        fact="an assertion failed in a kernel on the GPU",
        meaning="Mostly an index out of range. Kernels run later than the line that started them: the traceback "
        "points at the wrong one.",
        advice=("CUDA_LAUNCH_BLOCKING=1 before the command, to see the right line",),
        source="CUDA runtime, cudaErrorAssert",
    ),
    Rule(
        name="no-kernel-for-gpu",
        pattern=_re(
            "no kernel image is available for execution",
            r"CUDA capability sm_(?P<sm>\d+) is not compatible",
            "compute capability (?P<capability>[0-9.]+) .*no longer supports",
        ),
        fact="this torch was not built for this GPU",
        meaning="A wheel holds kernels for a range of compute capabilities; the GPU is older or newer than that.",
        advice=("launchkit doctor", "the torch for your GPU: https://pytorch.org/get-started/locally"),
        source="CUDA runtime, cudaErrorNoKernelImageForDevice; torch/cuda/__init__.py",
    ),
    Rule(
        name="driver-too-old",
        pattern=_re(
            r"NVIDIA driver on your system is too old \(found version (?P<found>\d+)\)",
            "CUDA driver version is insufficient for CUDA runtime version",
            "the provided PTX was compiled with an unsupported toolchain",
        ),
        fact="the NVIDIA driver is too old for this torch",
        meaning="The torch was built for a newer CUDA than the driver has.",
        advice=("launchkit doctor", "a newer driver, or a torch for an older CUDA: https://pytorch.org/get-started"),
        source="torch c10/cuda/CUDAFunctions.cpp; CUDA runtime, cudaErrorInsufficientDriver",
    ),
    Rule(
        name="torch-without-cuda",
        pattern=_re("Torch not compiled with CUDA enabled"),
        fact="this torch was built without CUDA",
        meaning="It is the CPU wheel, whatever GPU is here.",
        advice=("launchkit doctor", "the torch for your GPU: https://pytorch.org/get-started/locally"),
        source="torch/cuda/__init__.py, _lazy_init",
    ),
    Rule(
        name="no-gpu",
        pattern=_re(
            "Found no NVIDIA driver on your system",
            "No CUDA GPUs are available",
            "no CUDA-capable device is detected",
            r"Your setup doesn't support bf16/gpu",
            "There are currently no available devices found",
        ),
        fact="no GPU is seen",
        meaning="There is none, its driver is not loaded, the container was not given it, or CUDA_VISIBLE_DEVICES "
        "hides it.",
        advice=("launchkit doctor", "docker run --gpus all, in a container"),
        source="torch c10/cuda/CUDAFunctions.cpp; transformers/training_args.py; accelerate/utils/dataclasses.py",
    ),
    Rule(
        name="more-ranks-than-gpus",
        pattern=_re("invalid device ordinal", r"Duplicate GPU detected : rank (?P<rank>\d+)"),
        fact="there are more processes than GPUs",
        meaning="A process was given a GPU that is not there, or one that another process has already.",
        advice=("launchkit gpus", "as many processes as GPUs that CUDA_VISIBLE_DEVICES shows"),
        source="CUDA runtime, cudaErrorInvalidDevice; NCCL src/init.cc",
    ),
    Rule(
        name="gpu-busy",
        pattern=_re(r"CUDA-capable device\(s\) is/are busy or unavailable"),
        fact="the GPU is held by another process alone",
        meaning="It is in exclusive mode, or a process that died still holds it.",
        advice=("nvidia-smi", "sudo nvidia-smi -c DEFAULT"),
        source="CUDA runtime, cudaErrorDevicesUnavailable",
    ),
    Rule(
        name="gpu-hardware",
        pattern=_re(
            "uncorrectable ECC error",
            "GPU is lost",
            "fallen off the bus",
            "NVLink error",
            "hardware stack error",
        ),
        fact="the GPU reports a fault of its own",
        meaning="No program can cause it; the kernel's log names it with an Xid number.",
        advice=("sudo dmesg | grep -i xid", "nvidia-smi -q -d ECC"),
        source="CUDA runtime, cudaErrorECCUncorrectable and others",
    ),
    Rule(
        name="illegal-access",
        pattern=_re("an illegal memory access was encountered", "unspecified launch failure", "misaligned address"),
        fact="a kernel on the GPU went beyond its memory",
        meaning="A faulty kernel, or shapes that it does not expect. The traceback points at a later line.",
        advice=(
            "CUDA_LAUNCH_BLOCKING=1 before the command, to see the right line",
            "--attention sdpa, without --compile",
        ),
        source="CUDA runtime, cudaErrorIllegalAddress",
    ),
    Rule(
        name="cuda-in-fork",
        pattern=_re("Cannot re-initialize CUDA in forked subprocess"),
        fact="a forked process uses CUDA",
        meaning="A dataloader's worker or a notebook touched the GPU before it forked.",
        advice=("num_workers=0, or multiprocessing_context='spawn'",),
        source="torch/cuda/__init__.py, _lazy_init",
    ),
    # NCCL, gloo and the rendezvous
    Rule(
        name="shared-memory",
        pattern=_re(
            r"Error while creating shared memory segment",
            r"/dev/shm\S* .*No space left",
            r"DataLoader worker.*is killed by signal: Bus error",
            "out of shared memory",
            r"unable to (?:open|write to|mmap).*shared memory.*torch_",
        ),
        fact="/dev/shm is too small",
        meaning="NCCL and dataloaders pass data through shared memory, of which a container has 64 MiB by default.",
        advice=("docker run --shm-size=16g (or --ipc=host)", "dataloader_num_workers=0, or NCCL_SHM_DISABLE=1"),
        source="NCCL src/misc/shmutils.cc; torch/utils/data/_utils/signal_handling.py",
    ),
    Rule(
        name="nccl-interface",
        pattern=_re("[Nn]o socket interface found", "no usable (?:network )?interface"),
        fact="NCCL found no network interface",
        meaning="NCCL_SOCKET_IFNAME names one that is not here, or only loopback is up.",
        advice=("unset NCCL_SOCKET_IFNAME", "ip -br addr, then export NCCL_SOCKET_IFNAME=<one of them>"),
        source="NCCL src/bootstrap.cc, bootstrapNetInit",
    ),
    Rule(
        name="nccl-connect",
        pattern=_re(
            r"socketStartConnect: Connect to (?P<peer>\S+) failed",
            r"socketPollConnect.*(?:No route to host|Connection refused|timed out)",
            r"connectFullMesh failed",
            r"Gloo connectFullMesh",
        ),
        fact="one process could not reach another over the network",
        meaning="A firewall, or an interface that the other node cannot route to.",
        advice=(
            "export NCCL_SOCKET_IFNAME=<the interface between the nodes> (GLOO_SOCKET_IFNAME for gloo)",
            NCCL_DEBUG,
        ),
        source="NCCL src/misc/socket.cc; gloo/transport/tcp/pair.cc",
    ),
    Rule(
        name="infiniband-memlock",
        pattern=_re(r"Call to ibv_\w+ failed", "ibv_reg_mr.*failed"),
        fact="InfiniBand could not be set up",
        meaning="Mostly the limit of locked memory (ulimit -l) inside a container.",
        advice=("docker run --ulimit memlock=-1", "NCCL_IB_DISABLE=1, which is slower"),
        source="NCCL src/misc/ibvwrap.cc",
    ),
    Rule(
        name="port-in-use",
        pattern=_re("EADDRINUSE", "[Aa]ddress already in use"),
        fact="the rendezvous port is taken",
        meaning="Another run listens on it, or one that was killed left a process behind.",
        advice=("another --master-port", "ss -ltnp, to see who has it"),
        source="torch TCPStore, torch/csrc/distributed/c10d/socket.cpp",
    ),
    Rule(
        name="master-address",
        pattern=_re(
            r"The client socket has (?:failed to connect|timed out).*",
            r"IPv[46] network addresses of \((?P<host>[^,]+), \d+\) cannot be retrieved",
            r"RendezvousConnectionError",
            r"connection to the C10d store has failed",
        ),
        fact="node 0 was not reached",
        meaning="MASTER_ADDR does not name it from here, a firewall closes the port, or node 0 is not up.",
        advice=("--master-addr ADDRESS of node 0, the same --master-port on every node", "nc -vz ADDRESS PORT"),
        source="torch/csrc/distributed/c10d/socket.cpp, TCPStore.cpp",
        is_echo=True,
    ),
    Rule(
        name="rendezvous",
        pattern=_re(
            r"wait timeout after \d+ms, keys",
            r"Timed out after \d+ seconds waiting for clients",
            "RendezvousTimeoutError",
            "timed out waiting for clients",
        ),
        fact="not every process came to the rendezvous",
        meaning="Another node was not started, died before, or was told another number of processes.",
        advice=("the same command on every node, each with its own --node-rank",),
        source="torch/csrc/distributed/c10d/TCPStore.cpp, PrefixStore; torch/distributed/elastic/rendezvous",
        is_echo=True,
    ),
    Rule(
        name="collective-timeout",
        pattern=_re(
            "Watchdog caught collective operation timeout",
            r"Timed out waiting (?P<gloo_ms>\d+)ms for (?:recv|send) operation",
        ),
        fact="the ranks waited for each other until the time was up",
        meaning="One rank did not come to the collective: it was busy (tokenising, saving, loading), took another "
        "branch, or GPU-to-GPU traffic hangs.",
        advice=(
            "py-spy dump --pid of the rank that is silent, while it hangs",
            "NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 before the command, on consumer GPUs",
            "ddp_timeout=7200 in the training arguments, where a rank has long work alone",
        ),
        source="torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp; gloo/transport/tcp/unbound_buffer.cc",
        is_echo=True,
    ),
    Rule(
        name="peer-lost",
        pattern=_re(
            "Connection (?:closed|reset) by peer",
            "Broken pipe",
            "ncclRemoteError",
            "remote process exited or there was a network error",
            "DistNetworkError",
            "recvValue failed",
            "Socket closed",
            "Read timeout",
            "NCCL communicator was aborted",
        ),
        fact="the connection to another rank broke",
        meaning="That rank died; its own log, perhaps on another node, says why.",
        advice=("the logs of the other nodes", "sudo dmesg | grep -i 'killed process', on each node"),
        source="gloo/transport/tcp/pair.cc; NCCL, ncclRemoteError; torch TCPStore",
        is_echo=True,
    ),
    Rule(
        name="nccl",
        pattern=_re(r"NCCL error in", r"nccl\w+Error", "NCCL WARN"),
        fact="NCCL failed",
        meaning="Its last line says where.",
        advice=(NCCL_DEBUG, "NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 tells which transport is at fault"),
        source="torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp",
    ),
    # Host memory and limits
    Rule(
        name="worker-killed",
        pattern=_re(r"DataLoader worker \(pid.*\) (?:is killed by signal: Killed|exited unexpectedly)"),
        fact="a dataloader's worker was killed, probably out of host memory",
        meaning="Each worker holds its own copy of what the data set touches.",
        advice=("dataloader_num_workers=0, or fewer", "sudo dmesg | grep -i 'killed process'"),
        source="torch/utils/data/_utils/signal_handling.py, torch/utils/data/dataloader.py",
    ),
    Rule(
        name="host-memory",
        pattern=_re(
            "can't allocate memory",
            "Cannot allocate memory",
            r"^(?:numpy\S*\.)?_?(?:Array)?MemoryError",
            "std::bad_alloc",
            r"oom[-_]kill",
            "Out of memory: Killed process",
            r"^(?:\S+: line \d+: +\d+ )?Killed\b",
        ),
        fact="out of host memory",
        meaning="The machine (or its container) has no more memory for the processes together.",
        advice=LESS_HOST_MEMORY,
        source="torch c10/core/impl/alloc_cpu.cpp; Python; the kernel's mm/oom_kill.c",
    ),
    Rule(
        name="open-files",
        pattern=_re("Too many open files"),
        fact="too many open files",
        meaning="ulimit -n is the limit; dataloader workers share tensors through files.",
        advice=("ulimit -n 65536 before the command", "torch.multiprocessing.set_sharing_strategy('file_system')"),
        source="errno EMFILE",
    ),
    Rule(
        name="threads",
        pattern=_re("can't start new thread", "pthread_create failed", "fork: Resource temporarily unavailable"),
        fact="no more processes or threads can be started",
        meaning="ulimit -u, or the container's limit of processes.",
        advice=("ulimit -u unlimited before the command", "docker run --pids-limit -1", "OMP_NUM_THREADS=1"),
        source="errno EAGAIN",
    ),
    # Disk
    Rule(
        name="disk-full",
        pattern=_re(
            "No space left on device",
            r"os error 28\b",
            r"unexpected pos \d+ vs \d+",
            "basic_ios::clear: iostream error",
            "PytorchStreamWriter failed writing",
        ),
        fact="the disk is full",
        meaning="A checkpoint was being written, or a download. torch.save says it as a wrong position in its file.",
        advice=("another --run-dir, or a smaller save_total_limit", "df -h"),
        source="errno ENOSPC; torch caffe2/serialize/inline_container.cc; safetensors",
    ),
    Rule(
        name="disk-quota",
        pattern=_re("Disk quota exceeded", r"os error 122\b"),
        fact="the disk quota is used up",
        meaning="Of your user, often in the home directory, where the hub's cache lies by default.",
        advice=("quota -s", "HF_HOME=/another/disk before the command, or another --run-dir"),
        source="errno EDQUOT",
    ),
    Rule(
        name="not-writable",
        pattern=_re("Permission denied: '?(?P<path>[^'\n]*)", "Read-only file system"),
        fact="a file may not be written or read",
        advice=("another --run-dir, or HF_HOME=/a/directory/of/yours",),
        source="errno EACCES, EROFS",
    ),
    # Launchers
    Rule(
        name="no-launcher",
        pattern=_re(r"env:// rendezvous: environment variable (?P<variable>\w+) expected, but not set"),
        fact="the script was started without a launcher",
        meaning="It joins a process group, and nobody set {variable}.",
        advice=("torchrun --nproc-per-node N script.py, or launchkit launch script.py",),
        source="torch/distributed/rendezvous.py, _env_rendezvous_handler",
    ),
    # DeepSpeed
    Rule(
        name="deepspeed-no-launcher",
        pattern=_re("No module named 'mpi4py'"),
        fact="DeepSpeed was started without a launcher",
        meaning="Without RANK and WORLD_SIZE it looks for MPI.",
        advice=("torchrun --nproc-per-node N script.py, or launchkit launch script.py",),
        source="deepspeed/comm/comm.py, mpi_discovery",
    ),
    Rule(
        name="no-nvcc",
        pattern=_re(
            "CUDA_HOME does not exist",
            r"Unable to run \S*nvcc",
            r"nvcc: not found",
            "CUDA_HOME environment variable is not set",
        ),
        fact="a CUDA extension cannot be built: no nvcc",
        meaning="torch's wheel brings CUDA's libraries but not its compiler.",
        advice=(
            "apt-get install cuda-toolkit-<CUDA of torch>, then export CUDA_HOME=/usr/local/cuda",
            "zero_force_ds_cpu_optimizer: false in the DeepSpeed file avoids CPUAdam",
        ),
        source="deepspeed/ops/op_builder/builder.py, installed_cuda_version; torch/utils/cpp_extension.py",
    ),
    Rule(
        name="cuda-mismatch",
        pattern=_re(
            r"Installed CUDA version (?P<installed>\S+) does not match the version torch was compiled with "
            r"(?P<torch>[\d.]*\d)"
            r", unable to compile",
            r"The detected CUDA version \((?P<detected>\S+)\) mismatches the version that was used to compile\s*"
            r"PyTorch \((?P<wheel>\S+)\)",
        ),
        fact="nvcc {installed}{detected} does not match torch's CUDA {torch}{wheel}",
        meaning="An extension is built by the nvcc in CUDA_HOME or PATH, which must be of torch's major version.",
        advice=(
            "export CUDA_HOME=/usr/local/cuda-{torch}{wheel}",
            "DS_SKIP_CUDA_CHECK=1, where only the minor differs",
        ),
        source="deepspeed/ops/op_builder/builder.py, assert_no_cuda_mismatch; torch/utils/cpp_extension.py",
    ),
    Rule(
        name="no-ninja",
        pattern=_re("Ninja is required", "due to ninja not being installed"),
        fact="a C++ extension cannot be built: no ninja",
        advice=("pip install ninja",),
        source="torch/utils/cpp_extension.py, verify_ninja_availability; deepspeed/ops/op_builder/builder.py",
    ),
    Rule(
        name="no-python-headers",
        pattern=_re(r"fatal error: Python\.h"),
        fact="a C++ extension cannot be built: no headers of Python",
        advice=("apt-get install python3-dev (or python3.11-dev, the version in use)",),
        source="the compiler",
    ),
    Rule(
        name="no-compiler",
        pattern=_re(
            "Failed to find C compiler",
            r"Error building extension(?:.|\n)*/bin/sh: (?:line )?\d+: \S+: (?:command )?not found",
            r"\bcommand \S*(?:c\+\+|g\+\+|gcc)\S* failed: No such file",
        ),
        fact="a C++ extension cannot be built: no compiler",
        advice=("apt-get install build-essential", "export CXX=/path/of/g++"),
        source="torch/utils/cpp_extension.py; triton/runtime/build.py",
    ),
    Rule(
        name="extension-build",
        pattern=_re(
            r"Error building extension '(?P<extension>\w+)'",
            r"Unable to JIT load the (?P<op>\w+) op",
            "object has no attribute 'ds_opt_adam'",
        ),
        fact="a C++ extension of DeepSpeed did not build",
        meaning="The compiler's own words stand above it in the log.",
        advice=(
            "launchkit doctor",
            "ds_report",
            "zero_force_ds_cpu_optimizer: false in the DeepSpeed file avoids CPUAdam",
        ),
        source="torch/utils/cpp_extension.py, _run_ninja_build; deepspeed/ops/op_builder/builder.py",
    ),
    Rule(
        name="loss-scale",
        pattern=_re("Current loss scale already at minimum"),
        fact="the loss overflows in fp16 whatever its scale",
        meaning="Gradients were not finite for many steps on end: a learning rate that is too high, or a model that "
        "was trained in bf16.",
        advice=("--precision bf16", "a smaller learning rate"),
        source="deepspeed/runtime/fp16/loss_scaler.py",
    ),
    Rule(
        name="deepspeed-batch",
        pattern=_re(
            r"train_batch_size is not equal to micro_batch_per_gpu .* world_size (?P<sum>.*)",
        ),
        fact="the batch sizes in the DeepSpeed file do not multiply",
        meaning="train_batch_size must be micro-batch × accumulation × processes: {sum}.",
        advice=("train_batch_size: auto under the Trainer, or launchkit config PLAN",),
        source="deepspeed/runtime/config.py, _batch_assertion",
    ),
    Rule(
        name="deepspeed-mismatch",
        pattern=_re("Please correct the following DeepSpeed config values that mismatch TrainingArguments"),
        fact="the DeepSpeed file and the training arguments disagree",
        advice=("auto in the DeepSpeed file, or launchkit check FILE",),
        source="transformers/integrations/deepspeed.py, HfTrainerDeepSpeedConfig",
    ),
    Rule(
        name="resume-other-world",
        pattern=_re(
            r"checkpoint being loaded used a DP world size of (?P<then>\d+) but the current world size is (?P<now>\d+)"
        ),
        fact="the checkpoint is of {then} ranks, this run has {now}",
        meaning="ZeRO's optimizer states are cut by rank and cannot be cut anew while loading.",
        advice=(
            "{then} ranks again",
            "python -m deepspeed.checkpoint.ds_to_universal --input_folder CKPT --output_folder OUT, then "
            "load_universal_checkpoint",
        ),
        source="deepspeed/runtime/engine.py, _load_zero_checkpoint and _load_checkpoint",
    ),
    # FSDP, DDP
    Rule(
        name="fsdp-mixed-dtypes",
        pattern=_re(r"Must flatten tensors with uniform dtype but got (?P<one>[\w.]+) and (?P<other>[\w.]+)"),
        fact="FSDP1 cannot join {one} and {other} in one flat parameter",
        meaning="Mostly fp32 adapters on a bf16 model.",
        advice=("--strategy fsdp2, which has no flat parameters", "autocast_adapter_dtype=False in get_peft_model"),
        source="torch/distributed/fsdp/_flat_param.py, _validate_tensors_to_flatten",
    ),
    Rule(
        name="fsdp-integers",
        pattern=_re("Cannot flatten integer dtype tensors"),
        fact="FSDP1 cannot flatten quantised weights",
        meaning="bitsandbytes stores 4-bit weights as uint8 unless told otherwise.",
        advice=("bnb_4bit_quant_storage=torch.bfloat16, as the model's dtype", "--strategy fsdp2"),
        source="torch/distributed/fsdp/_flat_param.py, _validate_tensors_to_flatten",
    ),
    Rule(
        name="fsdp-wrap-class",
        pattern=_re("Could not find the transformer layer class(?: to wrap in the model| (?P<name>\\w+))?"),
        fact="the class that FSDP should wrap is not in the model",
        advice=("launchkit config PLAN, which takes the class from the model", "fsdp_transformer_layer_cls_to_wrap"),
        source="accelerate/utils/dataclasses.py, set_auto_wrap_policy",
    ),
    Rule(
        name="ddp-unused",
        pattern=_re("Expected to have finished reduction in the prior iteration"),
        fact="DDP waits for gradients that a step did not make",
        meaning="Some trainable parameters do not take part in the loss.",
        advice=("ddp_find_unused_parameters=True", "TORCH_DISTRIBUTED_DEBUG=DETAIL names the parameters"),
        source="torch/csrc/distributed/c10d/reducer.cpp, ensure_prior_reduction_finished",
    ),
    Rule(
        name="ddp-twice",
        pattern=_re("Expected to mark a variable ready only once"),
        fact="a parameter's gradient was made twice in one DDP step",
        meaning="Re-entrant checkpointing, or a module that runs twice.",
        advice=("--checkpointing full (use_reentrant=False)", "ddp_find_unused_parameters=False"),
        source="torch/csrc/distributed/c10d/reducer.cpp, mark_variable_ready",
    ),
    Rule(
        name="checkpoint-recompute",
        pattern=_re(
            "A different number of tensors was saved during the original forward",
            "Recomputed values .* different metadata",
        ),
        fact="checkpointing recomputed something else than the forward pass did",
        meaning="A cache of keys and values, dropout outside of torch's generator, or checkpointing twice.",
        advice=("use_cache=False in the model's configuration", "--checkpointing reentrant"),
        source="torch/utils/checkpoint.py",
    ),
    # The hub
    Rule(
        name="gated-model",
        pattern=_re(
            r"Cannot access gated repo for url \S*?huggingface\.co/(?:api/models/)?(?P<repo>[\w.-]+/[\w.-]+)",
            r"access a gated repo\.\s+Make sure to have access to it at https://huggingface\.co/(?P<at>[\w./-]+?)\.?$",
            r"(?P<named>\S+) is a gated repository",
            r"Access to model (?P<model>\S+) is restricted",
        ),
        fact="the model is gated and this user may not read it",
        advice=("the licence on https://huggingface.co/{repo}{at}{named}{model}, accepted there", "hf auth login"),
        source="huggingface_hub/utils/_http.py; transformers/utils/hub.py",
    ),
    Rule(
        name="hub-token",
        pattern=_re("Invalid user token", "401 Client Error", "Token is required"),
        fact="the hub does not accept the token",
        advice=("hf auth login", "hf auth whoami"),
        source="huggingface_hub/utils/_http.py",
    ),
    Rule(
        name="no-hub",
        pattern=_re(
            r"couldn't connect to 'https?://\S+'",
            "outgoing traffic has been disabled",
            "LocalEntryNotFoundError",
            r"(?:NameResolutionError|Temporary failure in name resolution|ConnectError).*",
            "Max retries exceeded with url",
        ),
        fact="the hub cannot be reached, and the files are not in its cache",
        meaning="No network, a proxy, or HF_HUB_OFFLINE=1.",
        advice=(
            "hf download MODEL where there is a network",
            "HF_HOME=/the/disk/with/the/cache",
            "launchkit doctor --online",
        ),
        source="transformers/utils/hub.py, cached_files; huggingface_hub/file_download.py",
    ),
    Rule(
        name="no-such-model",
        pattern=_re(
            "is not a local folder (?:and is not|or) a valid (?:model identifier|repository name)",
            "Repo id must be in the form",
            "RepositoryNotFoundError",
        ),
        fact="there is no such model, neither here nor on the hub",
        advice=("the path of a directory that is here, or the id as https://huggingface.co shows it",),
        source="transformers/utils/hub.py; huggingface_hub/utils/_validators.py",
    ),
    Rule(
        name="new-architecture",
        pattern=_re(r"has model type `(?P<type>[^`]+)` but Transformers does not recognize"),
        fact="this transformers does not know the architecture {type}",
        advice=("pip install --upgrade transformers",),
        source="transformers/models/auto/configuration_auto.py",
    ),
    # Data and tokenizer
    Rule(
        name="launchkit",
        pattern=_re(r"^launchkit\.errors\.\w+: (?P<said>[^;\n]+)(?:; (?P<todo>.*))?"),
        fact="{said}",
        advice=("{todo}",),
        source="launchkit/errors.py",
    ),
    Rule(
        name="bad-json",
        pattern=_re(r"JSON parse error: (?P<what>.*)", "JSONDecodeError", r"Trailing data at position \d+"),
        fact="the data is not JSON",
        meaning="One line is broken: JSON lines have one whole object per line.",
        advice=("python -c \"import json; [json.loads(l) for l in open('FILE') if l.strip()]\"", *OTHER_DATA),
        source="datasets/packaged_modules/json/json.py; pyarrow; Python's json",
    ),
    Rule(
        name="no-data",
        pattern=_re(
            r"Instruction \"\w+\" corresponds to no data",
            r"num_samples should be a positive integer value, but got num_samples=0",
            "doesn't contain any data files",
        ),
        fact="the data has no examples",
        advice=OTHER_DATA,
        source="datasets/arrow_reader.py; torch/utils/data/sampler.py",
    ),
    Rule(
        name="unused-columns",
        pattern=_re(
            r"No columns in the dataset match the model's forward .*ignored: \[(?P<columns>[^\]]*)\]",
        ),
        fact="the model takes none of the data's columns ({columns})",
        meaning="The Trainer wants tokens: input_ids and labels.",
        advice=("a tokenised data set, or TRL's SFTTrainer", "remove_unused_columns=False with a collator of your own"),
        source="transformers/trainer.py, _remove_unused_columns",
    ),
    Rule(
        name="missing-column",
        pattern=_re(r"KeyError: '(?P<column>[\w .-]+)'\s*\Z"),
        code=_re("datasets/", "sft_trainer", "dpo_trainer", r"utils/data/"),
        fact="the data has no column {column!r}",
        advice=("dataset_text_field='NAME' for TRL", *OTHER_DATA),
        source="trl/trainer/sft_trainer.py; datasets/formatting/formatting.py",
    ),
    Rule(
        name="no-padding-token",
        pattern=_re(
            "tokenizer does not have a padding token",
            "Cannot handle batch sizes > 1 if no padding token is defined",
        ),
        fact="the tokenizer has no padding token",
        advice=("tokenizer.pad_token = tokenizer.eos_token, before the trainer is made",),
        source="transformers/tokenization_utils_base.py, transformers/modeling_layers.py",
    ),
    Rule(
        name="no-chat-template",
        pattern=_re("tokenizer.chat_template is not set"),
        fact="the tokenizer has no chat template",
        meaning="A base model has none; its Instruct version does.",
        advice=("the model's Instruct version, or chat_template_path in SFTConfig", "data with a text column"),
        source="transformers/tokenization_utils_base.py, get_chat_template",
    ),
    Rule(
        name="sequence-too-long",
        pattern=_re(
            r"The expanded size of the tensor \((?P<size>\d+)\) must match the existing size \((?P<limit>\d+)\)",
            r"size of tensor a \((?P<a>\d+)\) must match the size of tensor b \((?P<b>\d+)\)",
        ),
        fact="two lengths differ ({size}{a} and {limit}{b})",
        meaning="A sequence longer than the model's positions, or rows of different length in one batch.",
        advice=("truncation=True, max_length=N where the data is tokenised", "a collator that pads"),
        source="torch ATen/ExpandUtils.cpp",
    ),
    Rule(
        name="rows-of-different-length",
        pattern=_re("Unable to create tensor, you should probably activate truncation and/or padding"),
        fact="rows of different length were put in one batch",
        advice=("DataCollatorForLanguageModeling(tokenizer, mlm=False), or padding=True",),
        source="transformers/tokenization_utils_base.py, convert_to_tensors",
    ),
    # The step
    Rule(
        name="dtypes",
        pattern=_re(
            r"expected (?:m1 and m2|mat1 and mat2) to have the same dtype, but got: (?P<one>\S+) != (?P<other>\S+)",
            r"expected scalar type (?P<wanted>\w+) but found (?P<found>\w+)",
            r"Input type \((?P<input>\S+)\) and (?:weight|bias) type \((?P<weight>\S+)\) should be the same",
            "must (?:all )?have the same dtype",
            "FlashAttention only support fp16 and bf16 data type",
        ),
        fact="two dtypes meet in one operation ({one}{wanted}{input} and {other}{found}{weight})",
        meaning="Part of the model is in another precision, and no autocast is on here.",
        advice=("dtype=torch.bfloat16 for all of the model, or bf16=True in the training arguments",),
        source="torch ATen/native/LinearAlgebra.cpp, ATen/native/cudnn/ConvShared.cpp; flash_attn",
    ),
    Rule(
        name="devices",
        pattern=_re(
            r"Expected all tensors to be on the same device",
            r"Tensor on device \S+ is not on the expected device",
        ),
        fact="tensors of one operation are on different devices",
        meaning='device_map="auto" under a launcher, a batch that was not moved, or offloaded weights that were not '
        "loaded.",
        advice=("no device_map under torchrun or accelerate launch",),
        source="torch ATen, c10/core/TensorImpl; torch/_prims",
    ),
    Rule(
        name="nothing-trainable",
        pattern=_re("element 0 of tensors does not require grad"),
        fact="the loss depends on nothing that is trained",
        meaning="All weights are frozen, or re-entrant checkpointing starts at frozen embeddings.",
        advice=("model.enable_input_require_grads(), or --checkpointing full (use_reentrant=False)",),
        source="torch/csrc/autograd/autograd.cpp",
    ),
    Rule(
        name="in-place",
        pattern=_re("modified by an inplace operation"),
        fact="a value that the backward pass needs was overwritten",
        advice=("torch.autograd.set_detect_anomaly(True) names the operation",),
        source="torch/csrc/autograd/saved_variable.cpp",
    ),
    Rule(
        name="not-a-number",
        pattern=_re(r"Function '(?P<function>\w+)' returned nan values", "Loss is (?:nan|NaN|inf)", "NaN detected in"),
        fact="a value is not a number (NaN)",
        meaning="A learning rate that is too high, fp16's range, or a row whose labels are all ignored.",
        advice=("--precision bf16", "a smaller learning rate"),
        source="torch/csrc/autograd/python_anomaly_mode.cpp",
    ),
    Rule(
        name="lora-targets",
        pattern=_re(
            r"Target modules (?P<targets>.*?) not found in the base model",
            "No modules were targeted for adaptation",
        ),
        fact="the model has no layers called {targets}",
        advice=('--lora-targets all-linear (target_modules="all-linear" in PEFT)',),
        source="peft/tuners/tuners_utils.py, inject_adapter",
    ),
    Rule(
        name="other-shapes-saved",
        pattern=_re(
            r"size mismatch for (?P<name>\S+): copying a param with shape",
            r"Error\(s\) in loading state_dict",
        ),
        fact="the checkpoint is of another model",
        meaning="Its tensors have other shapes or names: other sizes, an added token, an adapter of another rank.",
        advice=("the model that the checkpoint was made from",),
        source="torch/nn/modules/module.py, load_state_dict",
    ),
    Rule(
        name="no-checkpoint",
        pattern=_re(
            r"No valid checkpoint found in output directory(?: \((?P<path>[^)]*)\))?",
            "Can't find a valid checkpoint at",
        ),
        fact="there is no checkpoint to resume from",
        advice=("ls {path}", "resume_from_checkpoint=False"),
        source="transformers/trainer.py, train and _load_from_checkpoint",
    ),
    Rule(
        name="shapes",
        pattern=_re(r"mat1 and mat2 shapes cannot be multiplied \((?P<shapes>[^)]*)\)"),
        fact="two matrices do not fit each other ({shapes})",
        meaning="A layer is given an input of another width than it was made for.",
        source="torch ATen/native/LinearAlgebra.cpp",
    ),
    Rule(
        name="compile",
        pattern=_re(r"torch\._(?:dynamo|inductor)\.exc\.", "InductorError", "BackendCompilerFailed"),
        fact="torch.compile failed",
        advice=("the same without --compile", "TORCHDYNAMO_VERBOSE=1 before the command"),
        source="torch/_dynamo/exc.py, torch/_inductor/exc.py",
    ),
    # Packages
    Rule(
        name="bitsandbytes-without-gpu",
        pattern=_re(
            r"No GPU found\. A GPU is needed for quantization",
            "None of the available devices .* (?:are|is) supported for the bitsandbytes version",
            r"Native code method attempted to call: lib\.\w+",
            "CUDA Setup failed despite",
        ),
        fact="bitsandbytes has no library for what is here",
        meaning="It found no GPU, or was built for another CUDA than torch's.",
        advice=("launchkit doctor", "python -m bitsandbytes", "pip install --upgrade bitsandbytes"),
        source="bitsandbytes/cextension.py; transformers/integrations/bitsandbytes.py",
    ),
    Rule(
        name="flash-attention",
        pattern=_re(r"FlashAttention\d has been toggled on, but it cannot be used"),
        fact="flash attention is asked for and not installed",
        advice=("--attention sdpa, as fast on most GPUs", "pip install flash-attn --no-build-isolation"),
        source="transformers/modeling_utils.py, _flash_attn_import_error",
    ),
    Rule(
        name="binary-mismatch",
        pattern=_re(r"undefined symbol: (?P<symbol>\w+)", r"DLL load failed", r"GLIBC(?:XX)?_[\d.]+' not found"),
        fact="a compiled package was built for another torch or system",
        advice=("the package built anew: pip install --force-reinstall --no-cache-dir --no-build-isolation NAME",),
        source="the dynamic loader",
    ),
    Rule(
        name="missing-package",
        pattern=_re(r"No module named '(?P<package>[A-Za-z_]\w*)"),
        fact="the package {package} is not installed",
        advice=("pip install {install}",),
        source="Python, ModuleNotFoundError",
    ),
    Rule(
        name="missing-name",
        pattern=_re(
            r"cannot import name '(?P<name>\w+)' from '(?P<module>[\w.]+)'",
            r"module '(?P<of>[\w.]+)' has no attribute '(?P<attribute>\w+)'",
        ),
        fact="{module}{of} has no {name}{attribute}: versions that do not go together",
        advice=("launchkit doctor",),
        source="Python, ImportError",
    ),
    Rule(
        name="needs-package",
        pattern=_re(r"requires the (?P<library>\w+) library", r"[Uu]sing .* requires (?P<name>\w+): `pip install"),
        fact="{library}{name} is not installed",
        advice=("pip install {library}{name}",),
        source="transformers/utils/import_utils.py",
    ),
    # The program itself
    Rule(
        name="arguments",
        pattern=_re(
            r"error: unrecognized arguments: (?P<arguments>.*)",
            r"error: (?P<what>the following arguments are required.*)",
        ),
        fact="the script does not take these arguments: {arguments}{what}",
        meaning="DeepSpeed's launcher adds --local_rank=N to every script's arguments.",
        advice=("parser.add_argument('--local_rank', type=int, default=0), or launch by torchrun",),
        source="Python, argparse; deepspeed/launcher/launch.py",
    ),
)

_ORDER = {rule.name: place for place, rule in enumerate(RULES)}

SIGNALS: Mapping[int, Cause] = {
    signal.SIGKILL: Cause(
        name="killed",
        fact="killed, probably out of host memory",
        meaning="SIGKILL cannot be answered: the kernel sends it when memory runs short, schedulers at a limit.",
        advice=(*LESS_HOST_MEMORY, "sudo dmesg | grep -i 'killed process'"),
    ),
    signal.SIGSEGV: Cause(
        name="segmentation-fault",
        fact="a crash in native code",
        meaning="A compiled library went beyond its memory: often one that was built for another torch.",
        advice=("python -X faulthandler, with one process, to see whether it stays", "launchkit doctor"),
    ),
    signal.SIGABRT: Cause(
        name="aborted",
        fact="a native library gave up",
        meaning="Its last words are in the rank's log.",
        advice=("the end of the rank's log",),
    ),
    signal.SIGBUS: Cause(
        name="bus-error",
        fact="a mapped file or shared memory could not be read or written",
        meaning="/dev/shm is too small, a disk is full, or a file was cut while it was mapped.",
        advice=("df -h /dev/shm", "docker run --shm-size=16g"),
    ),
    signal.SIGILL: Cause(
        name="illegal-instruction",
        fact="a library was built for another processor",
        advice=("pip install --force-reinstall NAME",),
    ),
    signal.SIGFPE: Cause(name="floating-point-exception", fact="a crash in native code (division by zero)"),
    signal.SIGTERM: Cause(
        name="terminated",
        fact="ended from outside (SIGTERM)",
        meaning="A scheduler at its time limit, a person, or the launcher after another rank failed.",
        advice=("the scheduler's own log",),
    ),
    signal.SIGHUP: Cause(
        name="hung-up",
        fact="ended with its terminal (SIGHUP)",
        advice=("tmux, nohup or a scheduler, so that the run outlives the terminal",),
    ),
    signal.SIGINT: Cause(name="interrupted", fact="interrupted (Ctrl-C)"),
}


def recognise(text: str, *, code: str = "") -> Cause | None:
    """The first rule that an error's text meets."""
    for rule in RULES:
        match = rule.pattern.search(text)
        if match and (rule.code is None or rule.code.search(code)):
            return _filled(rule, match)
    return None


def recognise_chain(messages: Sequence[str], *, code: str = "") -> Cause | None:
    """What chained exceptions are known as: the most special of their rules. A chain tells of another rank only where
    all of it does."""
    causes = [recognise(message, code=code) for message in messages]
    known = [cause for cause in causes if cause is not None and not cause.is_echo]
    if known:
        return min(known, key=lambda cause: _ORDER[cause.name])
    return causes[-1] if all(causes) else None


def is_echo(text: str) -> bool:
    """Whether an error only tells that another rank is gone or does not come."""
    cause = recognise(text)
    return cause is not None and cause.is_echo


def explain(line: str, exit_code: int = 1) -> str:
    """What an error line or exit code means and what to do about it, in a few words; empty when nothing is known."""
    cause = recognise(line) or (SIGNALS.get(signal_of(exit_code)) if exit_code else None)
    if cause is None or (cause.name == "launchkit"):  # whose errors say it all themselves
        return ""
    return "; ".join((cause.fact, *cause.advice[:1]))


def signal_of(exit_code: int) -> int:
    """The signal behind an exit code in any of its spellings: -9, 137 (a shell's), 247 (-9 as a byte); 0 for none."""
    for number in (-exit_code, exit_code - 128, 256 - exit_code):
        if 0 < number < signal.NSIG:
            return number
    return 0


def signal_name(number: int) -> str:
    """``SIGINT`` for 2."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _Details(dict[str, str]):
    """What a pattern's groups found; nothing for a group that another alternative has."""

    def __missing__(self, key: str) -> str:
        return ""


def _filled(rule: Rule, match: re.Match[str]) -> Cause:
    details = _Details({name: value.strip() for name, value in match.groupdict().items() if value})
    if "package" in details:
        details["install"] = INSTALL.get(details["package"], details["package"])
    return Cause(
        name=rule.name,
        fact=_said(rule.fact, details),
        meaning=_said(rule.meaning, details),
        advice=tuple(text for advice in rule.advice if (text := _said(advice, details))),
        is_echo=rule.is_echo,
        details=dict(details),
    )


def _said(template: str, details: _Details) -> str:
    """The template with its names filled in; an empty pair of brackets and what it left behind goes."""
    return re.sub(r" ?\((?: and )?\)", "", template.format_map(details))
