"""Puts ``ds_configs/``, which lies beside the package in a checkout, into the package of a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithDeepSpeedConfigs(build_py):
    """Copies the package's modules and data, and the shipped DeepSpeed JSON files."""

    def run(self) -> None:
        super().run()
        # An editable install finds the checkout's own (SHIPPED in config/deepspeed_json.py).
        if not self.editable_mode:
            self.copy_tree("ds_configs", str(Path(self.build_lib) / "vqmoe_ds" / "ds_configs"))


setup(cmdclass={"build_py": WithDeepSpeedConfigs})
