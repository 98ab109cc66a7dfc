//! Landlock: the paths that a running agent may use, and none besides.

use std::{
    fs,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use tracing::warn;

use super::{Paths, SandboxError};
use crate::kernel::PINS;

/// Whatever a kernel knows of these is restricted, and granted by [`rules`] only.
const KNOWN: ABI = ABI::V6;

/// Whether this kernel can.
pub(super) fn restrict(paths: &Paths) -> Result<bool, SandboxError> {
    let failed = SandboxError::Files;
    let mut ruleset = Ruleset::default()
        .set_compatibility(landlock::CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(KNOWN)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(KNOWN)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for (path, access) in rules(paths) {
        match PathFd::new(&path) {
            Ok(fd) => {
                ruleset = ruleset
                    .add_rule(PathBeneath::new(fd, access))
                    .map_err(failed)?
            }
            // Not there at the start, so nothing needs it: but the operator may wonder later.
            Err(error) => warn!(path = %path.display(), %error, "sandbox: this path stays closed"),
        }
    }
    let status = ruleset.restrict_self().map_err(failed)?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

fn rules(paths: &Paths) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let keep_files = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::ReadDir
        | AccessFs::RemoveFile
        | AccessFs::MakeReg
        | AccessFs::Truncate;
    let list = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut rules = vec![
        // Per-CPU counters are read for each CPU that may come.
        ("/sys/devices/system/cpu".into(), list),
        // Of this process only.
        ("/proc/self".into(), list),
        (
            folder_of(&paths.control).to_owned(),
            AccessFs::RemoveFile.into(),
        ),
        (paths.bpffs.join(PINS), keep_files | AccessFs::RemoveDir),
    ];
    if paths.unpin {
        rules.push((paths.bpffs.clone(), AccessFs::RemoveDir.into()));
    }
    rules.extend(paths.state.iter().map(|state| (state.clone(), keep_files)));
    rules.extend(config(paths).map(|path| (path, AccessFs::ReadFile.into())));
    rules
}

/// Where the configuration is, and where it is in truth if that is a link.
fn config(paths: &Paths) -> impl Iterator<Item = PathBuf> {
    let file = paths.config.iter();
    let both = file.flat_map(|file| [std::path::absolute(file), fs::canonicalize(file)]);
    // One that cannot be found now cannot be opened for later.
    both.flatten().map(|file| readable(&file).to_owned())
}

/// An editor puts a new file in the place of the old one, so the folder must be open for a reload to
/// see it; but not one that is everybody's, as `/etc` is.
fn readable(file: &Path) -> &Path {
    let folder = folder_of(file);
    if folder.components().count() > 2 {
        folder
    } else {
        file
    }
}

fn folder_of(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_everybody_is_not_opened_for_one_file() {
        for (file, opened) in [
            ("/etc/dhcp-reclaim/dhcp-reclaim.toml", "/etc/dhcp-reclaim"),
            ("/etc/dhcp-reclaim.toml", "/etc/dhcp-reclaim.toml"),
            ("/root/c.toml", "/root/c.toml"),
            ("/c.toml", "/c.toml"),
        ] {
            assert_eq!(readable(Path::new(file)), Path::new(opened));
        }
    }

    #[test]
    fn a_link_is_followed_to_where_the_configuration_is() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (linked, real) = (dir.join("etc"), dir.join("store"));
        for folder in [&linked, &real] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(real.join("c.toml"), "").unwrap();
        std::os::unix::fs::symlink(real.join("c.toml"), linked.join("c.toml")).unwrap();
        let paths = Paths {
            config: Some(linked.join("c.toml")),
            state: Vec::new(),
            control: "/run/c".into(),
            bpffs: "/b".into(),
            unpin: false,
        };
        assert_eq!(config(&paths).collect::<Vec<_>>(), [linked, real]);
    }

    #[test]
    fn nothing_may_be_run_and_no_device_made() {
        let paths = Paths {
            config: Some("/etc/dhcp-reclaim/c.toml".into()),
            state: vec!["/var/lib/dhcp-reclaim".into()],
            control: "/run/dhcp-reclaim/control.sock".into(),
            bpffs: "/sys/fs/bpf".into(),
            unpin: true,
        };
        let never = AccessFs::Execute
            | AccessFs::MakeBlock
            | AccessFs::MakeChar
            | AccessFs::MakeSym
            | AccessFs::IoctlDev;
        for (path, access) in rules(&paths) {
            assert!(!access.intersects(never), "{}", path.display());
        }
    }
}
