"""The recipe that trains the bundled ``emoji`` model: data, autoencoder, U-Net, fine-tunes, figures."""
