"""What every pipeline needs: opening, streaming, finishing."""
