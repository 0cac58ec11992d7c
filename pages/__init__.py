"""What a person looks at: the data of the latents page, its template, ratings."""
