"""Several processes of one run: start-up of jax.distributed, what the first process does alone, failures told to all.

A run of several processes works in one directory on a file system that all of them see. Process 0 alone writes there
(but for checkpoints, which Orbax writes together); what it decides or has made reaches the others by `on_first`.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # its key-value store has no public door; Orbax uses this one too

from pinfm_jax.errors import ERROR, UserError
from pinfm_jax.progress import Progress


@dataclass(frozen=True)
class Method:
  """A way in which processes find each other without being told.

  Attributes:
    jax_name: of JAX's detection; None lets JAX try all it knows.
    where: it works.
    variables: of the environment, which must be there: JAX would go on without them.
  """

  jax_name: str | None
  where: str
  variables: tuple[str, ...] = ()


METHODS = {  # what --distributed takes
  'auto': Method(None, 'Slurm, Open MPI, Kubernetes or a TPU pod'),
  'slurm': Method(
    'slurm', 'a step of a Slurm job (start it with srun)', ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_PROCID')
  ),
  'ompi': Method('ompi', 'Open MPI (start it with mpirun)', ('OMPI_MCA_orte_hnp_uri', 'OMPI_COMM_WORLD_RANK')),
  # JAX's detection on Kubernetes has no name to ask for it by.
  'kubernetes': Method(
    None, 'an indexed Kubernetes Job or JobSet', ('KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX')
  ),
  'gke': Method('gketpu', 'a TPU node of GKE', ('TPU_WORKER_ID', 'TPU_WORKER_HOSTNAMES')),
  'tpu': Method('gcetpu', 'a Cloud TPU VM of a pod slice'),
}
_FAILED = 'pinfm/failed'
_POLL_S = 0.5
_keys = itertools.count()


@dataclass(frozen=True)
class Launch:
  """How this process finds the others.

  Attributes:
    method: a key of METHODS, or 'none'; ignored when the address is explicit.
    coordinator: HOST:PORT of process 0, with process_id and num_processes.
    process_id: this process's number, from 0.
    num_processes: how many there are.
    init_timeout_s: how long processes wait for each other at the start and at the end.
    heartbeat_timeout_s: a process that is silent for so long counts as dead, and all stop.
    stage_timeout_s: how long the others wait for what process 0 does alone (preparing the data, the export).
  """

  method: str = 'none'
  coordinator: str | None = None
  process_id: int | None = None
  num_processes: int | None = None
  init_timeout_s: int = 300
  heartbeat_timeout_s: int = 100
  stage_timeout_s: int = 86_400

  @property
  def explicit(self) -> bool:
    """Whether address and numbers are given."""
    return any(value is not None for value in (self.coordinator, self.process_id, self.num_processes))

  @property
  def alone(self) -> bool:
    """Whether this is a run of one process."""
    return self.method == 'none' and not self.explicit


_launch = Launch()


def start(launch: Launch) -> None:
  """Joins the processes of a run. Call it before anything touches a device.

  If not all have come within the time, this process ends with one line: JAX waits in C++, where nothing can be raised.

  Raises:
    UserError: options that do not fit, no such cluster here, no coordinator within the time, or a second call.
  """
  global _launch
  _check(launch)
  if jax.distributed.is_initialized():
    raise UserError('the processes of this run are joined already: start may be called once in a process')
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')  # without it, CPUs cannot talk to each other
  if not launch.explicit:
    arguments = {'cluster_detection_method': METHODS[launch.method].jax_name}
  else:
    arguments = {
      'coordinator_address': launch.coordinator,
      'process_id': launch.process_id,
      'num_processes': launch.num_processes,
      'cluster_detection_method': 'deactivate',
    }
    if launch.process_id:
      _wait_for_coordinator(launch)
    else:
      _check_port(launch)
  # JAX aborts the process with a stack trace when its own time-out ends, so ours ends first.
  guard = threading.Timer(launch.init_timeout_s, _leave, (_too_late(launch), 2))
  guard.daemon = True
  guard.start()
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=launch.init_timeout_s + 60,
      heartbeat_timeout_seconds=launch.heartbeat_timeout_s,
      shutdown_timeout_seconds=launch.init_timeout_s,
    )
  except (RuntimeError, ValueError, TypeError, KeyError, OSError, ImportError) as error:
    raise UserError(_start_problem(launch, error)) from error
  finally:
    guard.cancel()
  _launch = launch
  if jax.process_index():
    Progress.quiet = True
  threading.Thread(target=_watch, name='pinfm-watch', daemon=True).start()


@contextmanager
def session(launch: Launch) -> Iterator[None]:
  """The life of a process among others: joins them, and leaves or fails together with them.

  An exception is told to all processes, which then stop; without that, they would wait in a collective for ever.

  Raises:
    UserError: see `start`.
  """
  if launch.alone:
    yield
    return
  start(launch)
  with ExitStack() as stack:
    if not is_first():  # one process speaks for all
      stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, 'w'))))
    try:
      yield
    except BaseException as error:
      _fail(error)
  jax.distributed.shutdown()


def is_first() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def on_first(what: str, function: Callable[[], Any]) -> Any:
  """Runs the function in process 0 alone; every process returns its value once it has run.

  All processes must call it, in the same order: it is also a barrier at which the others wait for process 0. So what
  is read from the shared directory is decided in one place and never from a listing that lags behind.

  Args:
    what: is being done, for the error message.
    function: returns something that JSON can hold.

  Raises:
    UserError: in the other processes too when process 0 failed, or when it took longer than the stage time-out.
  """
  if jax.process_count() == 1:
    return function()
  key = f'pinfm/first/{next(_keys)}'
  if not is_first():
    return _from_first(key, what)
  try:
    text = json.dumps({'value': function()})
  except BaseException as error:
    _client().key_value_set(key, json.dumps({'error': _described(error)}))
    raise
  _client().key_value_set(key, text)
  return json.loads(text)['value']


def _from_first(key: str, what: str) -> Any:
  end = time.monotonic() + _launch.stage_timeout_s
  while time.monotonic() < end:
    text = _get(key)
    if text is None:
      time.sleep(0.02)
      continue
    answer = json.loads(text)
    if 'error' in answer:
      raise UserError(f'process 0 failed ({what}): {answer["error"]}')
    return answer['value']
  raise UserError(
    f'process {jax.process_index()} waited {_launch.stage_timeout_s} s for process 0 ({what}); '
    "look at process 0's output, or raise --stage-timeout"
  )


def _client() -> Any:
  return jax_distributed.global_state.client


def _get(key: str) -> str | None:
  try:
    return _client().key_value_try_get(key)
  except jax.errors.JaxRuntimeError as error:
    if 'NOT_FOUND' in str(error):
      return None
    raise


def _check(launch: Launch) -> None:
  if launch.method not in ('none', *METHODS):
    raise UserError(f"--distributed is '{launch.method}'; expected one of: none, {', '.join(METHODS)}")
  for name in ('init_timeout_s', 'heartbeat_timeout_s', 'stage_timeout_s'):
    if getattr(launch, name) < 1:
      raise UserError(f'--{name.removesuffix("_s").replace("_", "-")} is {getattr(launch, name)}; expected seconds > 0')
  if not launch.explicit:
    missing = [name for name in METHODS[launch.method].variables if name not in os.environ]
    if missing:
      raise UserError(_nowhere(launch, f' ({missing[0]} is not set)'))
    return
  if launch.method not in ('none', 'auto'):
    raise UserError(f'--coordinator and --distributed {launch.method} exclude each other; drop one of them')
  if None in (launch.coordinator, launch.process_id, launch.num_processes):
    raise UserError('--coordinator, --process-id and --num-processes belong together; give all three, in each process')
  host, _, port = launch.coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65_536:
    raise UserError(f"--coordinator is '{launch.coordinator}'; expected HOST:PORT of process 0, for example node1:9876")
  if launch.num_processes < 1 or not 0 <= launch.process_id < launch.num_processes:
    raise UserError(
      f'--process-id is {launch.process_id} of --num-processes {launch.num_processes}; '
      'expected 0 to N - 1, another one in each process'
    )


def _wait_for_coordinator(launch: Launch) -> None:
  """Waits until process 0 listens: JAX itself would end the process without a word that a user can use."""
  host, _, port = launch.coordinator.rpartition(':')
  end, problem = time.monotonic() + launch.init_timeout_s, 'no answer'
  while time.monotonic() < end:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=max(end - time.monotonic(), 0.1)).close()
      return
    except OSError as error:
      problem = error.strerror or str(error)
      time.sleep(min(_POLL_S, max(end - time.monotonic(), 0)))
  raise UserError(
    f'no coordinator at {launch.coordinator} after {launch.init_timeout_s} s ({problem}); start process 0 there, '
    'check host, port and firewall, or raise --init-timeout'
  )


def _check_port(launch: Launch) -> None:
  """Looks whether process 0 can listen: JAX's service crashes where it cannot."""
  port = int(launch.coordinator.rpartition(':')[2])
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except OSError as error:
      raise UserError(
        f'process 0 cannot listen at {launch.coordinator} ({error.strerror}); take another port in all processes'
      ) from error


def _nowhere(launch: Launch, why: str) -> str:
  return (
    f'--distributed {launch.method}: this process does not run in {METHODS[launch.method].where}{why}; start it there, '
    'or give --coordinator HOST:PORT --process-id I --num-processes N'
  )


def _start_problem(launch: Launch, error: Exception) -> str:
  text = ' '.join(str(error).split())
  if isinstance(error, ImportError):
    return f'--distributed {launch.method} needs the Python package {error.name}; install it: pip install {error.name}'
  if 'should be defined' in text or 'must be defined' in text or isinstance(error, KeyError):
    return _nowhere(launch, '')
  if 'initialise the XLA backend' in text:
    return 'the processes must be joined before a device is used; start `pinfm run` anew'
  return f'the processes could not be joined: {text[:300]}'


def _too_late(launch: Launch) -> str:
  return (
    f'not all processes came within {launch.init_timeout_s} s; start each of them with the same --coordinator and '
    '--num-processes and a --process-id of its own, or raise --init-timeout'
  )


def _watch() -> None:
  """Stops this process when another one says that it failed: it may wait for the dead in a collective."""
  while jax.distributed.is_initialized():
    try:
      text = _get(_FAILED)
    except (jax.errors.JaxRuntimeError, AttributeError):  # shut down meanwhile, or JAX ends the process itself
      return
    if text is not None:
      failure = json.loads(text)
      if failure['process'] != jax.process_index():
        time.sleep(1)  # the main thread may be about to tell the same
        here = f'process {jax.process_index()}'
        _leave(f'{here}: process {failure["process"]} failed: {failure["error"]}; this one stops too', 2)
    time.sleep(_POLL_S)


def _fail(error: BaseException) -> None:
  """Tells the error to the user and to the other processes, and ends this one; never returns."""
  code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
  if code == 1:
    traceback.print_exception(error)
  text = _described(error)
  with suppress(jax.errors.JaxRuntimeError):  # someone was first, or there is nobody left to tell
    _client().key_value_set(_FAILED, json.dumps({'process': jax.process_index(), 'error': text}))
  print(f'{ERROR}process {jax.process_index()}: {text}', file=sys.stderr)
  if is_first():
    time.sleep(4 * _POLL_S + 1)  # the others read it from the service that lives in this process
  _leave('', code)


def _leave(message: str, code: int) -> None:
  """Ends the process at once: an orderly end would wait for processes that will not come."""
  if message:
    print(f'{ERROR}{message}', file=sys.stderr)
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  os._exit(code)


def _described(error: BaseException) -> str:
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted; the same command resumes'
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:500]
