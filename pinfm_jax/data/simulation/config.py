"""The size and the nature of a simulated feed: configuration, presets, checks."""

from dataclasses import dataclass, fields, replace

from pinfm_jax.data.simulation.world import DEFAULT_ACTIONS, ActionModel
from pinfm_jax.errors import UserError


@dataclass(frozen=True)
class SimulatorConfig:
  """The size and the nature of a simulated feed.

  Attributes:
    users: U, people with an account; activity is log-normal, so some hardly ever come.
    items: items created up to the end of the log; half of them exist when it begins.
    days: length of the log.
    topics: latent topics of items and interests.
    sessions_a_day: mean sessions of a user a day; a session holds one to three requests.
    min_candidates: fewest items drawn for a request (an item drawn twice is shown once).
    max_candidates: most items drawn for a request.
    organic_events: mean events a session besides the impressions (search, related items).
    surfaces: names; the first is the feed itself.
    surface_share: share of requests on each surface.
    actions: what people do, and how likely. The plain features need actions called click, save and hide.
    session_pull: weight of the session's own topic beside the long-term interests.
    walk: daily standard deviation of the log of an interest.
    switch: share of users whose strongest interest moves to another topic in a day.
    content_width: D, width of the items' content vectors.
    content_noise: noise in them, relative to their length.
    start_ms: time of the first day, ms since 1970.
    seed: everything follows from it.
  """

  users: int = 2_500
  items: int = 4_000
  days: int = 14
  topics: int = 24
  sessions_a_day: float = 0.4
  min_candidates: int = 9
  max_candidates: int = 13
  organic_events: float = 10.0
  surfaces: tuple[str, ...] = ('home', 'search', 'related')
  surface_share: tuple[float, ...] = (0.7, 0.1, 0.2)
  actions: tuple[ActionModel, ...] = DEFAULT_ACTIONS
  session_pull: float = 0.5
  walk: float = 0.12
  switch: float = 0.03
  content_width: int = 32
  content_noise: float = 1.0
  start_ms: int = 1_704_067_200_000
  seed: int = 0

  def __post_init__(self):
    """Refuses sizes that cannot be simulated."""
    least = {'users': 1, 'items': 40, 'days': 1, 'topics': 5, 'content_width': 1, 'min_candidates': 1, 'seed': 0}
    for name, value in least.items():
      if getattr(self, name) < value:
        raise UserError(f'simulator: {name} is {getattr(self, name)}; it must be at least {value}')
    if self.max_candidates < self.min_candidates:
      raise UserError(
        f'simulator: max_candidates is {self.max_candidates}; it must be at least min_candidates, {self.min_candidates}'
      )
    if len(self.surfaces) < 2 or len(self.surfaces) != len(self.surface_share):
      raise UserError(
        f'simulator: {len(self.surfaces)} surfaces, {len(self.surface_share)} shares; give two or more, a share each'
      )
    for action in self.actions:
      if action.surfaces and len(action.surfaces) != len(self.surfaces):
        raise UserError(
          f'simulator: action {action.name} has {len(action.surfaces)} surface terms, there are {len(self.surfaces)} '
          'surfaces; give one each, or none'
        )
    missing = {'click', 'save', 'hide'} - {a.name for a in self.actions}
    if missing:
      raise UserError(f'simulator: actions lack {", ".join(sorted(missing))}; click, save and hide are needed')

  @classmethod
  def preset(cls, size: str, **changes) -> 'SimulatorConfig':
    """A configuration by name.

    tiny is for tests; quickstart takes a second (246,000 events, 221,000 impressions); medium 20 seconds and 3 GB of
    memory (4 million of each); large five times that.

    Args:
      size: the name.
      **changes: fields to replace.

    Raises:
      UserError: no such size or field.
    """
    if size not in _PRESETS:
      raise UserError(f'simulator: no size {size!r}; choose one of {", ".join(_PRESETS)}')
    unknown = set(changes) - {f.name for f in fields(cls)}
    if unknown:
      raise UserError(f'simulator: no option {sorted(unknown)[0]!r}; known: {", ".join(f.name for f in fields(cls))}')
    return replace(cls(**_PRESETS[size]), **changes)


_PRESETS = {
  'tiny': {'users': 150, 'items': 400, 'days': 6, 'topics': 8, 'content_width': 8},
  'quickstart': {},
  'medium': {'users': 20_000, 'items': 30_000, 'days': 30, 'topics': 48, 'content_width': 64},
  'large': {'users': 100_000, 'items': 200_000, 'days': 30, 'topics': 96, 'content_width': 64},
}
