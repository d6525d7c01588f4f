//! Sockets in directories of any depth.
//!
//! Invariant: the way that is given leads to the named file for as long as the directory is open, also
//! if its own path is longer than an address of a socket can be (108 bytes on Linux).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

/// A short way to a socket in a directory. Good while the directory, which is returned with it, is open.
///
/// # Errors
/// The directory cannot be opened, or the path names none.
pub fn short_path(path: &Path) -> io::Result<(File, PathBuf)> {
    let missing = || io::Error::from(io::ErrorKind::InvalidInput);
    let dir = File::open(path.parent().ok_or_else(missing)?)?;
    let name = path.file_name().ok_or_else(missing)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((dir, short))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_socket_is_reached_however_deep_it_lies() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("door.sock");
        assert!(UnixListener::bind(&path).is_err(), "a path that is short");
        let (_dir, short) = short_path(&path).unwrap();
        let _listener = UnixListener::bind(short).unwrap();
        assert!(path.exists());
        let (_dir, short) = short_path(&path).unwrap();
        UnixStream::connect(short).unwrap();
        assert!(short_path(Path::new("/")).is_err());
    }
}
