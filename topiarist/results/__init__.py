"""What a person looks at: reports, model cards, pages."""
