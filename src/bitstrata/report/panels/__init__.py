"""The panels of a report, one file each; `bitstrata.report.registry` finds them."""
