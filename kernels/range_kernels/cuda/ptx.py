"""Every intrinsic the CUDA kernels use, with a twin for the simulator: the one place that knows of LLVM and PTX."""

from __future__ import annotations

import numpy as np
from numba import cuda
from numba.core import config

SIMULATED = bool(getattr(config, "ENABLE_CUDASIM", False))

if SIMULATED:

    @cuda.jit(device=True)
    def float_from_bits(bits):
        """Reinterpret int32 bits as float32."""
        return np.int32(bits).view(np.float32)

    @cuda.jit(device=True)
    def bits_from_float(value):
        """Reinterpret a float32 as its int32 bits."""
        return np.float32(value).view(np.int32)

else:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def float_from_bits(typing_context, bits):
        """Reinterpret int32 bits as float32."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.FloatType())

        return types.float32(types.int32), codegen

    @intrinsic
    def bits_from_float(typing_context, value):
        """Reinterpret a float32 as its int32 bits."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.IntType(32))

        return types.int32(types.float32), codegen
