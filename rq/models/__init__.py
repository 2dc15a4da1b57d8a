"""The RQ-VAE: MLP layers, one quantiser, residual quantisers, the autoencoder."""
