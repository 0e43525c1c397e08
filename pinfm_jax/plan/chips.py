"""Public figures of accelerators: peak rate, memory, and how fast chips reach each other."""

import difflib
import os
from dataclasses import dataclass

from pinfm_jax.errors import UserError

PLATFORMS = ('cpu', 'cuda', 'tpu')
# The rest goes to the runtime, communication buffers and fragmentation.
USABLE = 0.92


@dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    name: as given to --chip.
    platform: 'cpu', 'cuda' or 'tpu'.
    flops: peak bfloat16 FLOP/s of dense matmuls; 0 = not known, and no time is estimated.
    float32: rate of float32 matmuls at JAX's default precision, as a share of `flops`.
    memory: bytes.
    bandwidth: of the memory, bytes/s.
    link: bytes/s that a device sends to the others inside a node (a slice on TPU).
    node: devices that reach each other by `link`.
    network: bytes/s that a device sends beyond the node.
    row_traffic: bytes of memory traffic for one byte of a table row read or written.
  """

  name: str
  platform: str
  flops: float
  float32: float
  memory: float
  bandwidth: float
  link: float
  node: int
  network: float
  row_traffic: float

  @property
  def usable(self) -> float:
    """Bytes that a plan may fill."""
    return USABLE * self.memory


def _gpu(name: str, flops: float, memory: float, bandwidth: float, nvlink: float, network: float) -> Chip:
  # TF32 matmuls run at half the bfloat16 rate; NVLink figures count both directions; a row of 32 bfloat16 is 64
  # bytes, the least that the memory delivers, so rows cost what they hold.
  return Chip(name, 'cuda', flops, 0.5, memory, bandwidth, nvlink / 2, 8, network, 1.0)


def _tpu(name: str, flops: float, memory: float, bandwidth: float, ici: float, pod: int, network: float) -> Chip:
  # Default precision multiplies float32 in bfloat16. A [G, 32] table lies with its rows along the lanes, so that one
  # row is spread over many lines: libtpu 0.0.42.1 counts 210 kB for a float32 row and 112 kB for a bfloat16 one that
  # are read, read again and written (compiled for v5e, v5p, v6e and v4: the same), some 570 times what they hold.
  return Chip(name, 'tpu', flops, 1.0, memory, bandwidth, ici, pod, network, 570.0)


# Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (dense rates, without sparsity); the
# network beyond the node from NVIDIA's DGX guides, a port a GPU: 200 Gb/s (DGX A100), 400 Gb/s (DGX H100, H200, B200).
# TPU: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"; link is the chip's interconnect bandwidth there
# (2400, 1600, 4800 and 3584 Gb/s); the data center network is shared by a host's chips.
CHIPS = (
  _gpu('A100-80GB', 312e12, 80e9, 2.039e12, 600e9, 25e9),
  _gpu('H100', 989e12, 80e9, 3.35e12, 900e9, 50e9),
  _gpu('H200', 989e12, 141e9, 4.8e12, 900e9, 50e9),
  _gpu('B200', 2250e12, 180e9, 8.0e12, 1800e9, 50e9),
  _tpu('v4', 275e12, 32e9, 1.228e12, 300e9, 4096, 6.25e9),
  _tpu('v5e', 197e12, 16e9, 0.819e12, 200e9, 256, 3.125e9),
  _tpu('v5p', 459e12, 95e9, 2.765e12, 600e9, 8960, 6.25e9),
  _tpu('v6e', 918e12, 32e9, 1.640e12, 448e9, 256, 12.5e9),
)
_DEFAULTS = {'cuda': 'H100', 'tpu': 'v5e'}


def find_chip(platform: str | None, name: str | None, devices: int) -> Chip:
  """The chip that --platform and --chip name; an H100 without either. A CPU device is a share of this machine.

  Raises:
    UserError: an unknown name, or a chip of another platform.
  """
  if platform is not None and platform not in PLATFORMS:
    raise UserError(f"--platform got '{platform}'; expected one of: {', '.join(PLATFORMS)}")
  if name is None:
    if platform == 'cpu':
      return host_chip(devices)
    name = _DEFAULTS[platform or 'cuda']
  known = {chip.name.lower(): chip for chip in CHIPS}
  if name.lower() not in known:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
    names = ', '.join(chip.name for chip in CHIPS)
    raise UserError(f"--chip got '{name}'; nearest is '{known[near[0]].name}' (all: {names})")
  chip = known[name.lower()]
  if platform not in (None, chip.platform):
    raise UserError(f"--chip {chip.name} is of platform '{chip.platform}', not '{platform}'; drop --platform")
  return chip


def host_chip(devices: int) -> Chip:
  """This machine's memory shared among `devices`; its rates are not known."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return Chip(f'this machine / {devices}', 'cpu', 0, 1.0, memory / devices, 0, 0, devices, 0, 1.0)
