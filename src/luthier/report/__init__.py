"""What a run's folder tells, as one structure, and its views: a page, Markdown, JSON, and a model card.

No model is loaded: everything comes from the files that the run has left (see :mod:`luthier.runfolder`).
"""

from luthier.report.gather import Report
from luthier.report.write import CARD, FORMATS, tell, write_card, write_reports

__all__ = ["CARD", "FORMATS", "Report", "tell", "write_card", "write_reports"]
