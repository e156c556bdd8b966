"""ResNet (18 by default) on CIFAR-10, on pictures in a folder for each class, or, without data, on scikit-learn's digits.

smlt train examples/resnet.py --workers 4 --epochs 2 --global-batch-size 64
RESNET_DEPTH=50 smlt train examples/resnet.py --data imagenet/ --workers 32 --global-batch-size 1024

RESNET_DEPTH: 18, 34, 50, 101 or 152. RESNET_PIXELS: the side of the pictures (32, of pictures from folders 224).
Variables of your shell do not come to functions: there write a script of your own beside this one,

    from resnet import ResNet
    class ResNet50(ResNet): depth = 50

resnet_images.py says which files --data may hold.
"""

import os

import torch
from resnet_images import open_images
from torch import nn
from torch.nn import functional

import smlt
from smlt.errors import ConfigError

#: Blocks at each of the four resolutions, and whether they are bottlenecks: He et al., CVPR 2016, table 1, arXiv:1512.03385
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
#: Of red, green and blue in ImageNet's pictures, for values from 0 to 1.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convolution(inputs, outputs, size, stride=1):
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """Two convolutions of 3x3, or 1x1, 3x3, 1x1, and a way around them."""

    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        outputs = width * 4 if bottleneck else width
        if bottleneck:
            layers = [*convolution(inputs, width, 1), nn.ReLU(), *convolution(width, width, 3, stride), nn.ReLU()]
            layers += convolution(width, outputs, 1)
        else:
            layers = [*convolution(inputs, width, 3, stride), nn.ReLU(), *convolution(width, width, 3)]
        self.layers = nn.Sequential(*layers)
        same = stride == 1 and inputs == outputs
        self.around = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x):
        return functional.relu(self.layers(x) + self.around(x))


def resnet(depth, classes, small=False, width=64):
    """For pictures (batch, 3, height, width), float32. `small`: without the stem that makes a quarter of a picture's sides.

    `width`: channels of the first blocks. With 1,000 classes ResNet-18 has 11,689,512 parameters, ResNet-50 25,557,032.
    """
    if depth not in DEPTHS:
        raise ConfigError(f"RESNET_DEPTH={depth}: choose one of {', '.join(map(str, DEPTHS))}")
    counts, bottleneck = DEPTHS[depth]
    layers = [*convolution(3, width, 3 if small else 7, 1 if small else 2), nn.ReLU()]
    layers += [] if small else [nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for level, count in enumerate(counts):
        for number in range(count):
            block = Block(inputs, width << level, 2 if level and not number else 1, bottleneck)
            layers.append(block)
            inputs = (width << level) * (4 if bottleneck else 1)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def cropped(images, pixels, top, left):
    """From each of (batch, 3, side, side) the square with its corner at (top, left), which are (batch,)."""
    reach, every = torch.arange(pixels), torch.arange(len(images))[:, None, None]
    rows, columns = (top[:, None] + reach)[:, :, None], (left[:, None] + reach)[:, None, :]
    return images.permute(0, 2, 3, 1)[every, rows, columns].permute(0, 3, 1, 2)


class ResNet(smlt.Task):
    depth = int(os.environ.get("RESNET_DEPTH", "18"))
    pixels = int(os.environ.get("RESNET_PIXELS", "0"))  # 0: what suits the data
    width = 64
    lr = 0.02

    def data(self):
        self.images = open_images(self, self.pixels)
        self.pixels = self.images.pixels
        print(
            f"ResNet-{self.depth} on {self.images.name}: {len(self.images.train):,} to train, {len(self.images.test):,} to test"
        )
        return {"train": self.images.train, "test": self.images.test}

    def model(self):
        return resnet(self.depth, self.images.classes, small=self.pixels <= 64, width=self.width)

    def loss(self, model, batch):
        return functional.cross_entropy(model(self.varied(batch[0])), batch[1], label_smoothing=0.1)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def evaluate(self, model, batch):
        images, labels = batch
        corner = torch.full((len(images),), (images.shape[-1] - self.pixels) // 2)
        scores = model(self.scaled(cropped(images, self.pixels, corner, corner)))
        accuracy = (scores.argmax(1) == labels).float().mean().item()
        return {"accuracy": accuracy, "test_loss": functional.cross_entropy(scores, labels).item()}

    def varied(self, images):
        """Cut out at random, and mirrored at random: by PyTorch's generator, which SMLT seeds anew for each step."""
        if images.shape[-1] == self.pixels:
            images = functional.pad(images, [self.pixels // 8] * 4)
        top, left = torch.randint(images.shape[-1] - self.pixels + 1, (2, len(images)))
        images = cropped(images, self.pixels, top, left)
        if self.images.may_be_mirrored:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        return self.scaled(images)

    def scaled(self, images):
        """uint8 from 0 to 255 as float32 about 0."""
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        return (images / 255 - mean) / deviation


if __name__ == "__main__":
    ResNet.main()
