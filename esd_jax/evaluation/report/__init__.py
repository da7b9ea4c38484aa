"""Evidence as people read it: the HTML report, the card, the comparison, and text."""
