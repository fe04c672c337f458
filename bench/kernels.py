"""What torch.compile makes for an H200 out of a block and of the head, without a GPU.

    python bench/kernels.py                                 8B, 8,192 tokens, nothing recomputed
    python bench/kernels.py --shape 3B --tokens 16384 --recompute
    python bench/kernels.py --variant varying-heads         or keep-more, more-kernels

For each kernel of the forward and the backward pass, without the matrix products and attention: the
instructions of its machine code, how many of them load from memory, the widest load in bits, and
the calls (divisions of integers). Each thread of an element-wise kernel makes 8 numbers. Also the
conditions on sizes (s12 is the number of tokens) under which these programs hold. --code DIR writes
them there.

Needs torch's build for CUDA, on Linux (2.11 was tried): pip takes it from PyPI, with triton and its
assembler. How: the model is traced on the CPU with tensors that have no data, marked as FSDP marks
it. Then the tensors' device is changed to a GPU, and Inductor is given an H200's properties.
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

from common import ROOT, at_least

sys.path.insert(0, str(ROOT))

import support  # noqa: F401  before torch, which reads what it sets

# isort: split
import torch
import variants
from gpu import SHAPES
from torch import Tensor
from torch._inductor import compile_fx, graph
from torch._inductor import config as inductor_config
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree

import model as model_py
from model import Llama, Segments, rope_tables
from support import compiler

CUDA = torch.device("cuda:0")
H200 = SimpleNamespace(
    name="NVIDIA H200",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    warp_size=32,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20,
    total_memory=143771 * 2**20,
)


class Written(BaseException):
    """The program is written; it cannot be loaded without a GPU."""


def pretend_h200() -> None:
    """Makes Inductor write programs for an H200."""
    import torch._inductor.scheduler as scheduler
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    said = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (9, 0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, value in said.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    for interface, name, value in [
        (CudaInterface, "is_available", True),
        (CudaInterface, "get_compute_capability", 90),
        (CudaInterface, "get_device_properties", H200),
        (CudaInterface, "is_triton_capable", True),
        (CudaInterface.Worker, "get_device_properties", H200),
        (CudaInterface.Worker, "current_device", 0),
    ]:
        setattr(interface, name, staticmethod(lambda *_, value=value: value))
    scheduler.has_triton = lambda *_: True
    fake_tensor.init_gpu_context = lambda _: None
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, is_active=lambda: True))


class Programs:
    """A backend of torch.compile that keeps the programs which Inductor writes for an H200."""

    def __init__(self):
        self.texts: list[str] = []
        self.guards: set[str] = set()
        self.on_cuda: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, module, inputs, options=None):
        with inductor_config.patch(options or {}):
            return compile_fx.compile_fx(module, inputs, inner_compile=self.write)

    def moved(self, values):
        """The same, with each tensor on a GPU."""

        def move(x):
            if not isinstance(x, FakeTensor):
                return x
            if id(x) not in self.on_cuda:
                with fake_tensor.no_dispatch():
                    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
                self.on_cuda[id(x)] = x, FakeTensor(x.fake_mode, empty, CUDA)
            return self.on_cuda[id(x)][1]

        return _pytree.tree_map(move, values)

    def write(self, module, inputs, **options):
        for node in module.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = self.moved(node.meta["val"])
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
        module.recompile()

        def keep(text: str) -> None:
            self.texts.append(text)
            raise Written

        def stop(*_) -> None:
            raise Written

        graph.GraphLowering.save_output_code = staticmethod(keep)
        available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        with contextlib.suppress(Written):
            compile_fx.compile_fx_inner(module, self.moved(list(inputs)), **options)
        torch.cuda.is_available = available
        modes = {x.fake_mode for x in inputs if isinstance(x, FakeTensor)}
        self.guards |= {str(guard.expr) for mode in modes for guard in mode.shape_env.guards}
        return stop


def write_programs(a: argparse.Namespace) -> Programs:
    """The programs of a block's forward and backward pass and of the head's element-wise work."""
    programs = Programs()
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._inductor.config.force_disable_caches = True
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    model_py.on_cuda = lambda x: True
    if a.variant:
        variants.VARIANTS[a.variant]()
    compiled, torch.compile = torch.compile, functools.partial(torch.compile, backend=programs)
    with torch.device("meta"):
        model = Llama(a.shape).bfloat16()
    compiler.compile_model(model)
    torch.compile = compiled
    block = model.model["layers"][0]
    block.recompute = a.recompute
    for module in block.modules():  # as FSDP does
        module._is_fsdp_managed_module = module._fsdp_use_orig_params = True
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        block.to_empty(device="cpu")
        half = dict(dtype=torch.bfloat16)
        x_TD = torch.empty(a.tokens, a.shape.hidden_size, **half, requires_grad=True)
        keys = torch.empty(a.tokens * 11 // 10, dtype=torch.int64)
        starts = torch.empty(17, dtype=torch.int32)
        rope = rope_tables(a.shape, torch.empty(a.tokens, dtype=torch.int64))
        logits_SV = torch.empty(2000, a.shape.vocab_size, **half)
        for run in (
            lambda: block(x_TD, rope, Segments(starts, starts.clone(), keys, 2048)),
            lambda: model.exponentiate(logits_SV),
        ):
            with contextlib.suppress(Written):
                run()
    return programs


def machine_code(name: str, source: str) -> list[str]:
    """The instructions of a kernel, for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = ast.literal_eval(re.search(r"'signature': (\{.*?\})", source)[1])
    aligned = re.findall(r"\((\d+),\): \[\['tt.divisibility', 16\]\]", source)
    sizes = {"XBLOCK": 1024} if "poi" in name else {"XBLOCK": 1, "R0_BLOCK": 2048}
    sizes |= {"RSPLIT_SIZE": 64, "NUM_STAGES": 1}
    if "per" in name:
        del sizes["R0_BLOCK"]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "kernel.py"
        helpers = "from torch._inductor.runtime import triton_helpers\n"
        helpers += "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
        body = source[source.index("@triton.jit") :]
        place.write_text(f"import triton\nimport triton.language as tl\n{helpers}{body}")
        spec = importlib.util.spec_from_file_location("kernel", place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        program = ASTSource(
            getattr(module, name),
            signature=types,
            constexprs={(i,): sizes[key] for i, key in enumerate(types) if key in sizes},
            attrs={(int(i),): [["tt.divisibility", 16]] for i in aligned},
        )
        options = {"num_warps": 4 if "poi" in name else 16}
        compiled = triton.compile(program, target=GPUTarget("cuda", 90, 32), options=options)
        binary = Path(scratch) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.check_output([nvdisasm, "-c", binary], text=True)
    return [line for line in text.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--tokens", type=at_least(100), default=8192)
    parser.add_argument("--recompute", action="store_true")
    of_compiler = ("keep-more", "varying-heads", "more-kernels")
    parser.add_argument("--variant", choices=of_compiler)
    parser.add_argument("--code", type=Path, metavar="DIR")
    a = parser.parse_args()
    if not torch.version.cuda:
        sys.exit("kernels.py: needs torch's build for CUDA; this one is for CPUs")
    a.shape = SHAPES[a.shape]
    pretend_h200()
    torch.cuda.is_available = lambda: False  # until Inductor asks: tracing is done on the CPU
    programs = write_programs(a)
    simple = re.compile(r"(\d+\*)?s\d+ [<>]=? (?!2147483647)\d+")
    limits = {guard for guard in programs.guards if simple.fullmatch(guard)}
    print(f"these programs hold if: {', '.join(sorted(limits)) or '-'}")
    print(f"{'instructions':>12} {'loads':>5} {'bits':>4} {'calls':>5}  kernel")
    titles = ("forward", "backward", "head")
    for title, text in zip(titles, programs.texts, strict=True):
        print(title)
        if a.code:
            a.code.mkdir(parents=True, exist_ok=True)
            (a.code / f"{title}.py").write_text(text)
        found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", text, re.S)
        for name, source in found:
            code = machine_code(name, source)
            loads = [line for line in code if "LDG" in line]
            bits = [int(re.search(r"LDG\S*?\.U?(16|64|128)\b|$", x)[1] or 32) for x in loads]
            calls = sum("CALL" in line for line in code)
            print(
                f"{len(code):12,} {len(loads):5} {max(bits, default=0):4} {calls:5}  "
                f"{name.removeprefix('triton_')}"
            )


if __name__ == "__main__":
    main()
