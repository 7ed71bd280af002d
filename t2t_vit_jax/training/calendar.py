"""The calendar of a run: evaluations, checkpoints and reports."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Calendar:
  """Tells what is due after a step; steps count from 1.

  Attributes:
    last_step: where the run ends; it is evaluated, as is a step after it, of a run that was to be longer.
    evaluate_every: steps. An evaluated step is saved too.
    save_every: steps.
    report_every: steps. A saved step is reported too, so that a resumed run repeats no row of the metrics.
  """

  last_step: int
  evaluate_every: int
  save_every: int
  report_every: int

  def evaluates(self, step: int) -> bool:
    return step >= self.last_step or (step > 0 and step % self.evaluate_every == 0)

  def saves(self, step: int) -> bool:
    return self.evaluates(step) or step % self.save_every == 0

  def reports(self, step: int) -> bool:
    return self.saves(step) or step % self.report_every == 0
