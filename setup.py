"Package metadata read from settings.ini; dependencies and extras are declared there and here only."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

extras = {
    'dev': cfg['dev_requirements'].split(),
    # GPU only: both compile against the installed CUDA torch, so: pip install --no-build-isolation '.[mamba]'
    'mamba': ['mamba-ssm==2.3.2.post1', 'causal-conv1d==1.7.0'],
    'quant': ['bitsandbytes>=0.46'],
    'rdf': ['rdflib>=7'],
    'track': ['tensorboard', 'trackio'],
}

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else '',
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    packages=find_packages(include=['drag_lib', 'drag_lib.*']),
    package_data={'drag_lib': ['assets/*/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
