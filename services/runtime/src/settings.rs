//! Settings files: TOML, with unknown fields refused and an error that says where.
//!
//! Precedence is flag, then environment (both through clap), then file, then default. A process
//! reads its file into a struct of `Option`s that is `#[serde(deny_unknown_fields)]` and fills the
//! fields that its command line left open.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a settings file could not be used. Processes exit with [`EXIT_USAGE`].
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file can't be read.
    #[error("read settings file {}", path.display())]
    Read {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what the process understands.
    #[error("settings file {}: {message}", path.display())]
    Parse {
        /// As given.
        path: PathBuf,
        /// Line, column, and the fields that exist.
        message: String,
    },
}

/// Exit code for settings that can't be used (EX_USAGE of sysexits.h).
pub const EXIT_USAGE: u8 = 64;

/// Reads `path`, or gives the default when there is none.
///
/// # Errors
/// When the file can't be read, is not TOML, or names a field that does not exist.
pub fn load<T: DeserializeOwned + Default>(path: Option<&Path>) -> Result<T, SettingsError> {
    let Some(path) = path else {
        return Ok(T::default());
    };
    let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| SettingsError::Parse {
        path: path.to_owned(),
        message: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        workers: Option<u32>,
    }

    #[test]
    fn unknown_field_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.toml");
        std::fs::write(&path, "workers = 2\nwrokers = 3\n").unwrap();
        let error = load::<File>(Some(&path)).unwrap_err().to_string();
        assert!(
            error.contains("wrokers") && error.contains("line 2"),
            "{error}"
        );
    }

    #[test]
    fn missing_fields_stay_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.toml");
        std::fs::write(&path, "").unwrap();
        assert_eq!(load::<File>(Some(&path)).unwrap().workers, None);
        assert_eq!(load::<File>(None).unwrap().workers, None);
    }
}
