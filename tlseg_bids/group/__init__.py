"""The level ``group``: tables and one page of a whole study, from the derivatives alone.

`collect` reads scan after scan, `covariates` adds what the BIDS dataset says of each; `harmonise`
(ComBat, with `library` and `bayes`), `headsize`, `outliers`, `visits` and `exclusion` compute;
`tables` and `page` write.
"""

from tlseg_bids.group.run import run_group

__all__ = ["run_group"]
