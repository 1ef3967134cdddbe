"""Build of epmq-gptq; the metadata is in pyproject.toml.

`kernels/` lies at the top of the repository and is imported as `epmq_gptq.kernels`. It has no
`__init__.py` (see kernels/README.md), so packages are listed by hand and the files are copied
beside the bridge package at build time. So is docs/troubleshooting.md, which `explain` prints.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithOthers(build_py):
    """Put kernels/*.py and docs/troubleshooting.md into the built package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "epmq_gptq"
            for source in sorted((HERE / "kernels").glob("*.py")):
                self.copy_file(str(source), str(target / "kernels" / source.name))
            page = HERE / "docs" / "troubleshooting.md"
            self.copy_file(str(page), str(target / page.name))


def packages() -> list[str]:
    return sorted(
        ".".join(init.parent.relative_to(HERE).parts)
        for init in (HERE / "epmq_gptq").rglob("__init__.py")
    )


setup(
    version=re.search(
        r'^__version__ = "(.+)"', (HERE / "epmq_gptq/__init__.py").read_text(), re.M
    ).group(1),
    packages=packages(),
    cmdclass={"build_py": BuildWithOthers},
)
