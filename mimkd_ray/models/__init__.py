"""Networks by name: torchvision's, timm's, CIFAR networks; and their weights."""
