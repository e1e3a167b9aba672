"""Builds the native kernels; all else about the package is declared in setup.cfg."""

import itertools
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

NATIVE = Path("fxopt", "kernels", "native")
# Contraction is asked for by name: a kernel's results may not depend on whether a product was fused with its sum.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += ["-std=c++17", "-Wno-maybe-uninitialized"]  # GCC 12 says it of its own AVX-512 headers (GCC bug 105593)


class BuildKernels(build_ext):
    """Compiles all sources at once, with OpenMP where the compiler has it."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, source beside source; where that fails the package is installed without (`optional`)."""
        if self.compiler.compiler_type != "unix":
            raise CompileError("the kernels use the vector extensions of GCC and clang; fxopt runs without them")
        if self._has("-fopenmp"):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        compile_all = self.compiler.compile

        def compile_together(sources, *args, **kwargs):  # type: ignore[no-untyped-def]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], *args, **kwargs), sources)
                return list(itertools.chain.from_iterable(objects))

        self.compiler.compile = compile_together
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all

    def _has(self, flag: str) -> bool:
        """Whether a program builds with ``flag``."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
            try:
                objects = self.compiler.compile([os.fspath(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, os.path.join(folder, "probe"), extra_postargs=[flag])
            except (CompileError, LinkError):
                return False
        return True


setup(
    ext_modules=[
        Extension(
            "fxopt.kernels.native._kernels",
            sources=sorted(map(os.fspath, NATIVE.glob("*.cpp"))),
            depends=sorted(map(os.fspath, [*NATIVE.glob("*.h"), *NATIVE.glob("*.inc")])),
            extra_compile_args=FLAGS,
            py_limited_api=True,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
