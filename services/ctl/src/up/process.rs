//! Looks at processes of this machine by pid, and ends those that belong to a data directory.
//!
//! A pid alone proves nothing, since it may have been given to somebody else: before a signal is
//! sent, the process must show the directory in its arguments or as its working directory.

use std::{fs, path::Path, time::Duration};

use anyhow::bail;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

/// A kill takes effect within milliseconds; the kernel frees a large memory in this time.
const GONE_TIMEOUT: Duration = Duration::from_secs(10);
const GONE_POLL: Duration = Duration::from_millis(5);

/// Whether anything of the process is left but a zombie.
///
/// A zombie's other threads may still be ending, and hold its sockets until they have.
pub fn is_alive(pid: u32) -> bool {
    // "123 (name with ) in it) S 1 …": the state follows the last parenthesis.
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim_start().chars().next());
    match state {
        Some('Z' | 'X') => fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|t| t.count() > 1),
        Some(_) => true,
        None => false,
    }
}

/// Arguments of the process; empty when it is gone.
pub fn arguments(pid: u32) -> Vec<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let parts = raw.split(|b| *b == 0).filter(|part| !part.is_empty());
    parts
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect()
}

/// Whether the process works in the directory or was told of it.
pub fn belongs_to(pid: u32, dir: &Path) -> bool {
    let works_there =
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
    works_there || arguments(pid).iter().any(|a| argument_names(a, dir))
}

fn argument_names(argument: &str, dir: &Path) -> bool {
    let value = argument
        .split_once('=')
        .map_or(argument, |(_, value)| value);
    Path::new(value).starts_with(dir)
}

/// Processes that were started with `--data DIR` for exactly this directory.
pub fn started_with_data(dir: &Path) -> Vec<u32> {
    let dir = dir.to_string_lossy();
    let has_flag = |pid: &u32| {
        arguments(*pid)
            .windows(2)
            .any(|pair| pair[0] == "--data" && pair[1] == dir)
    };
    all_pids()
        .filter(has_flag)
        .filter(|pid| is_alive(*pid))
        .collect()
}

/// Every process that [`belongs_to`] the directory; for tests, which own theirs.
pub fn of_directory(dir: &Path) -> Vec<u32> {
    let own = std::process::id();
    let theirs = all_pids().filter(|pid| *pid != own && belongs_to(*pid, dir));
    theirs.filter(|pid| is_alive(*pid)).collect()
}

fn all_pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Sends a signal; a process that is gone already is not an error.
pub fn send(pid: u32, signal: Signal) {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let Some(pid) = raw
        && let Err(error) = kill_process(pid, signal)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(pid = pid.as_raw_nonzero().get(), %error, "can't signal a process");
    }
}

/// Kills the processes and waits until they are gone.
///
/// # Errors
/// When one is still there after the time that the kernel needs.
pub async fn kill_and_wait(pids: &[u32]) -> anyhow::Result<()> {
    for pid in pids {
        send(*pid, Signal::KILL);
    }
    let left = wait_gone(pids, GONE_TIMEOUT).await;
    if !left.is_empty() {
        bail!("processes {left:?} are still there {GONE_TIMEOUT:?} after they were killed");
    }
    Ok(())
}

/// Waits until the processes are gone and returns those that are not when the time is over.
pub async fn wait_gone(pids: &[u32], timeout: Duration) -> Vec<u32> {
    let deadline = Instant::now() + timeout;
    loop {
        let left: Vec<u32> = pids.iter().copied().filter(|pid| is_alive(*pid)).collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        sleep(GONE_POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_belongs_to_where_it_works() {
        let pid = std::process::id();
        let cwd = std::env::current_dir().unwrap();
        assert!(is_alive(pid));
        assert!(belongs_to(pid, &cwd));
        assert!(!belongs_to(pid, Path::new("/nonexistent/mesh")));
    }

    #[test]
    fn an_argument_names_a_directory_only_as_a_whole_path() {
        let dir = Path::new("/data/mesh");
        assert!(argument_names("/data/mesh/hosts/host-1", dir));
        assert!(argument_names("--config=/data/mesh/p.toml", dir));
        assert!(!argument_names("/data/mesh-2/hosts/host-1", dir));
    }

    #[tokio::test]
    async fn a_killed_process_is_waited_for() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id();
        assert!(is_alive(pid));
        kill_and_wait(&[pid]).await.unwrap();
        assert!(!is_alive(pid), "a zombie counts as gone");
        child.wait().unwrap();
    }
}
