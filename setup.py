"Build bgtasks from `settings.ini`, the one place for its version, requirements, extras and commands."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
LICENSES = {'apache2': 'Apache-2.0'}
STATUS = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable',
          '6 - Mature', '7 - Inactive']


def read_settings():
    "The keys of `settings.ini`, with references between them filled in"
    ini = ConfigParser(delimiters='=')
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def extras(cfg):
    "Every key `NAME_requirements` is the extra `NAME`; `dev` holds the others too, since the tests use them all"
    res = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}
    res['dev'] = sorted({o for reqs in res.values() for o in reqs})
    return res

def classifiers(cfg):
    "What the package index sorts by"
    lo = int(cfg['min_python'].split('.')[1])
    return [f'Development Status :: {STATUS[int(cfg["status"])-1]}', f'Intended Audience :: {cfg["audience"]}',
            f'Natural Language :: {cfg["language"]}', 'Framework :: AsyncIO', 'Framework :: Trio', 'Typing :: Typed',
            *(f'Programming Language :: Python :: 3.{o}' for o in range(lo, 15))]


cfg = read_settings()
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license_expression=LICENSES[cfg['license']], license_files=['LICENSE'], classifiers=classifiers(cfg),
    long_description=(ROOT/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['bgtasks', 'bgtasks.*']), include_package_data=True,
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(), extras_require=extras(cfg),
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['bgtasks=bgtasks._modidx:d']},
    zip_safe=False)
