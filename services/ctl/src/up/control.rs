//! The controllers of a mesh on one machine: how many, where each has its own, and how they reach an
//! etcd that is somebody else's.
//!
//! Invariant: names of files are kept and passed on, never what is in them.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{CONTROLLER, CONTROLLER_STOP_TIMEOUT, Programs, child::Spec, layout::Layout};
use crate::failure::Failure;

/// As many as an etcd has members at most.
pub(super) const CONTROLLERS_MAX: u32 = 5;

/// How an external etcd is reached, as the controller's own flags.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdArgs {
    /// User of etcd, when it asks for one.
    #[arg(long, value_name = "USER", requires = "etcd_password_file")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_user: Option<String>,
    /// File whose first line is that user's password.
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_password_file: Option<PathBuf>,
    /// PEM file with the authority that signed etcd's certificates; with it, etcd is reached by TLS.
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_ca: Option<PathBuf>,
    /// PEM file with the controllers' certificate, when etcd asks for one.
    #[arg(long, value_name = "FILE", requires_all = ["etcd_key", "etcd_ca"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_cert: Option<PathBuf>,
    /// PEM file with the key of that certificate.
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_key: Option<PathBuf>,
}

impl EtcdArgs {
    /// Nothing is given.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// With paths that mean the same wherever a later start is made.
    ///
    /// # Errors
    /// When there is no current directory.
    pub(super) fn absolute(self) -> anyhow::Result<Self> {
        let whole = |path: Option<PathBuf>| path.map(std::path::absolute).transpose();
        Ok(Self {
            etcd_user: self.etcd_user,
            etcd_password_file: whole(self.etcd_password_file)?,
            etcd_ca: whole(self.etcd_ca)?,
            etcd_cert: whole(self.etcd_cert)?,
            etcd_key: whole(self.etcd_key)?,
        })
    }

    fn flags(&self) -> Vec<String> {
        let files = [
            ("--etcd-password-file", &self.etcd_password_file),
            ("--etcd-ca", &self.etcd_ca),
            ("--etcd-cert", &self.etcd_cert),
            ("--etcd-key", &self.etcd_key),
        ];
        let files = files.into_iter().filter_map(|(flag, path)| {
            let path = path.as_ref()?;
            Some([flag.to_owned(), path.display().to_string()])
        });
        let user = self.etcd_user.iter();
        let user = user.map(|user| ["--etcd-user".to_owned(), user.clone()]);
        user.chain(files).flatten().collect()
    }
}

/// Refuses what an embedded store can't have: it is inside of one controller.
///
/// # Errors
/// Says what to do instead.
pub(super) fn check(store: &str, controllers: u32, etcd: &EtcdArgs) -> Result<(), Failure> {
    if store != "embedded" {
        return Ok(());
    }
    let asked = if controllers > 1 {
        format!("--controllers {controllers}")
    } else if !etcd.is_empty() {
        "--etcd-…".to_owned()
    } else {
        return Ok(());
    };
    Err(Failure::Usage(format!(
        "{asked} needs an etcd: give --store etcd://HOST:PORT,… too; the embedded store is inside of \
         one controller"
    )))
}

/// The directory of each controller.
pub(super) fn dirs(layout: &Layout) -> Vec<PathBuf> {
    (0..layout.file.controller_ports().count())
        .map(|index| layout.dir.join(name(index)))
        .collect()
}

/// As it logs, and where its directory is.
fn name(index: usize) -> String {
    match index {
        0 => CONTROLLER.to_owned(),
        _ => format!("{CONTROLLER}-{}", index + 1),
    }
}

/// Where each of them is reached.
pub(super) fn addresses(layout: &Layout) -> Vec<String> {
    let ports = layout.file.controller_ports();
    ports.map(|port| format!("127.0.0.1:{port}")).collect()
}

/// How to run each of them.
pub(super) fn specs(layout: &Layout, programs: &Programs) -> Vec<Spec> {
    let all = addresses(layout).into_iter().zip(dirs(layout));
    all.enumerate()
        .map(|(index, (address, dir))| spec(layout, programs, index, (address, &dir)))
        .collect()
}

fn spec(
    layout: &Layout,
    programs: &Programs,
    index: usize,
    (address, dir): (String, &Path),
) -> Spec {
    let arguments = [
        ("--id", format!("c{}", index + 1)),
        ("--listen", address),
        ("--store", layout.file.shape.store.clone()),
        ("--data", dir.display().to_string()),
    ];
    let arguments = arguments
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value]);
    let name = name(index);
    Spec {
        program: programs.controller.clone(),
        arguments: arguments.chain(layout.file.etcd.flags()).collect(),
        log: layout.log(&name),
        bound_file: dir.join("controller.json"),
        stop_timeout: CONTROLLER_STOP_TIMEOUT,
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_etcd_has_is_refused_for_the_embedded_store() {
        let none = EtcdArgs::default();
        assert!(check("embedded", 1, &none).is_ok());
        assert!(check("etcd://h:1", 3, &none).is_ok());
        let said = |controllers, etcd: &EtcdArgs| {
            let refused = check("embedded", controllers, etcd).unwrap_err();
            refused.to_string()
        };
        assert!(said(3, &none).contains("--controllers 3 needs an etcd"));
        let etcd_user = Some("mesh".to_owned());
        let access = EtcdArgs { etcd_user, ..none };
        assert!(said(1, &access).contains("--store etcd://"));
    }

    #[test]
    fn access_is_passed_on_as_the_names_of_files() {
        let access = EtcdArgs {
            etcd_user: Some("mesh".into()),
            etcd_password_file: Some("/p".into()),
            etcd_ca: Some("/ca".into()),
            ..EtcdArgs::default()
        };
        let flags = access.flags();
        let expected = [
            "--etcd-user",
            "mesh",
            "--etcd-password-file",
            "/p",
            "--etcd-ca",
            "/ca",
        ];
        assert_eq!(flags, expected);
        assert!(access.absolute().unwrap().etcd_ca.unwrap().is_absolute());
    }
}
