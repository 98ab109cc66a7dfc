//! What a machine boots from: programs of this host with the libraries that they need, modules of
//! a kernel, and files.
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use cpio::newc::{Builder, ModeFileType, trailer};

use super::Kernel;
use crate::sandbox::find;

/// An archive in the making. A path keeps what it was first given.
#[derive(Clone, Default)]
pub struct Initramfs {
    entries: BTreeMap<PathBuf, Entry>,
    modules: Vec<String>,
}

#[derive(Clone)]
enum Entry {
    Dir,
    Link(PathBuf),
    File { mode: u32, contents: Vec<u8> },
    Host { mode: u32, path: PathBuf },
}

/// Where modules are, under names in whose order they can be loaded.
pub const MODULES: &str = "/modules";

impl Initramfs {
    /// The folders that every system has, laid out as on this host.
    pub fn new() -> Result<Self> {
        let mut this = Self::default();
        for name in ["bin", "sbin", "lib", "lib64"] {
            let path = Path::new("/").join(name);
            match fs::read_link(&path) {
                Ok(target) => {
                    this.dir(&Path::new("/").join(&target));
                    this.link(&path, target)
                }
                Err(_) => this.dir(&path),
            }
        }
        for dir in ["dev", "proc", "sys", "run", "tmp", "etc", "root", "var/lib"] {
            this.dir(&Path::new("/").join(dir));
        }
        Ok(this)
    }

    pub fn dir(&mut self, path: &Path) {
        self.add(path, Entry::Dir);
    }

    pub fn link(&mut self, path: &Path, target: impl Into<PathBuf>) {
        self.add(path, Entry::Link(target.into()));
    }

    pub fn file(&mut self, path: &Path, mode: u32, contents: impl Into<Vec<u8>>) {
        let contents = contents.into();
        self.add(path, Entry::File { mode, contents });
    }

    /// A file of this host under another name.
    pub fn copy_as(&mut self, host: &Path, path: &Path) -> Result<()> {
        let meta = fs::metadata(host).with_context(|| format!("{}", host.display()))?;
        let mode = meta.permissions().mode() & 0o7777;
        let host = host.to_owned();
        self.add(path, Entry::Host { mode, path: host });
        Ok(())
    }

    /// A file of this host, or a folder with all that is in it, where it is. A symbolic link brings
    /// along what it leads to.
    pub fn copy(&mut self, host: &Path) -> Result<()> {
        let real = fs::canonicalize(host).with_context(|| format!("{}", host.display()))?;
        let here = match (host.parent(), host.file_name()) {
            (Some(parent), Some(name)) => fs::canonicalize(parent)?.join(name),
            _ => real.clone(),
        };
        if here != real {
            self.link(&here, &real);
        }
        if !real.is_dir() {
            return self.copy_as(&real, &real);
        }
        self.dir(&real);
        for entry in fs::read_dir(&real)? {
            self.copy(&entry?.path())?;
        }
        Ok(())
    }

    /// A program by name or path, and the libraries that it loads.
    pub fn program(&mut self, program: &str) -> Result<PathBuf> {
        let path = find(program).with_context(|| format!("{program} is not installed"))?;
        self.copy(&path)?;
        self.libraries(&path)?;
        Ok(path)
    }

    /// The libraries that a program loads, without the program.
    pub fn libraries(&mut self, program: &Path) -> Result<()> {
        // Fails for what is not dynamic: scripts, and programs that need nothing.
        let output = Command::new("ldd").arg(program).output().context("ldd")?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            !told.contains("not found"),
            "libraries of {} are missing:\n{told}",
            program.display()
        );
        for library in told.split_whitespace().filter(|word| word.starts_with('/')) {
            self.copy(Path::new(library))?;
        }
        Ok(())
    }

    /// A module of `kernel`, and before it those that it needs. What is built in is there already.
    pub fn module(&mut self, kernel: &Kernel, name: &str) -> Result<()> {
        let name = name.replace('-', "_");
        if self.modules.contains(&name) {
            return Ok(());
        }
        let Some(module) = kernel.module(&name)? else {
            return Ok(());
        };
        for needed in &module.needs {
            self.module(kernel, needed)?;
        }
        let file = format!("{MODULES}/{:02}-{name}.ko", self.modules.len());
        self.modules.push(name);
        self.file(Path::new(&file), 0o644, module.object);
        Ok(())
    }

    /// Writes the archive, as the kernel reads it.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("{}", path.display()))?;
        self.archive(BufWriter::new(file))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn archive(&self, mut writer: impl Write) -> Result<()> {
        let console = Builder::new("dev/console")
            .mode(0o600)
            .set_mode_file_type(ModeFileType::Char)
            .rdev_major(5)
            .rdev_minor(1);
        // The kernel makes no folders on its way, and files may lie behind links.
        let mut dirs = BTreeSet::new();
        for (path, entry) in &self.entries {
            dirs.extend(path.ancestors().skip(1));
            if matches!(entry, Entry::Dir) {
                dirs.insert(path);
            }
        }
        for dir in dirs.into_iter().filter(|dir| *dir != Path::new("/")) {
            let mode = if dir == Path::new("/tmp") {
                0o1777
            } else {
                0o755
            };
            let builder = Builder::new(&name(dir)?).mode(mode);
            let builder = builder.set_mode_file_type(ModeFileType::Directory);
            builder.write(&mut writer, 0).finish()?;
        }
        for links in [true, false] {
            for (number, (path, entry)) in (1..).zip(&self.entries) {
                let (mode, kind, contents) = match entry {
                    Entry::Link(target) if links => {
                        let target = target.as_os_str().as_bytes().to_vec();
                        (0o777, ModeFileType::Symlink, target)
                    }
                    Entry::File { mode, contents } if !links => {
                        (*mode, ModeFileType::Regular, contents.clone())
                    }
                    Entry::Host { mode, path } if !links => {
                        let contents = fs::read(path);
                        let contents = contents.with_context(|| format!("{}", path.display()))?;
                        (*mode, ModeFileType::Regular, contents)
                    }
                    Entry::Dir | Entry::Link(_) | Entry::File { .. } | Entry::Host { .. } => {
                        continue;
                    }
                };
                let builder = Builder::new(&name(path)?).ino(number).mode(mode);
                let builder = builder.set_mode_file_type(kind);
                let mut body = builder.write(&mut writer, u32::try_from(contents.len())?);
                body.write_all(&contents)?;
                body.finish()?;
            }
        }
        console.write(&mut writer, 0).finish()?;
        trailer(&mut writer)?;
        writer.flush()?;
        Ok(())
    }

    fn add(&mut self, path: &Path, entry: Entry) {
        self.entries.entry(path.to_owned()).or_insert(entry);
    }
}

fn name(path: &Path) -> Result<String> {
    let name: &OsStr = path
        .strip_prefix("/")
        .context("a path from / on")?
        .as_os_str();
    Ok(name.to_str().context("a name in UTF-8")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_folders_before_what_is_in_them() {
        let mut initramfs = Initramfs::default();
        initramfs.file(Path::new("/a/b/c"), 0o755, "hello");
        initramfs.file(Path::new("/a/b/d"), 0o644, "");
        initramfs.link(Path::new("/init"), "a/b/c");
        let mut archive = Vec::new();
        initramfs.archive(&mut archive).unwrap();

        let mut names = Vec::new();
        let mut input = &archive[..];
        loop {
            let mut reader = cpio::newc::Reader::new(input).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            if entry.name() == "a/b/c" {
                let mut text = String::new();
                std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
                assert_eq!((text.as_str(), entry.mode()), ("hello", 0o100_755));
            }
            names.push(entry.name().to_owned());
            input = reader.finish().unwrap();
        }
        assert_eq!(names, ["a", "a/b", "init", "a/b/c", "a/b/d", "dev/console"]);
    }
}
