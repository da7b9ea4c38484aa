"""The evidence of an erasure: what is drawn and measured, attacks, and the report."""
