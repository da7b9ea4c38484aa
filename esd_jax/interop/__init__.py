"""What other programs take: eval-unlearn's technique and report, and ComfyUI's workflow."""
