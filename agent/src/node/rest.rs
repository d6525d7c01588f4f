//! Whether a process began with everything that the one before it had.
//!
//! An engine that is told to end writes and syncs its files before it says goodbye in its log. Whoever
//! starts on these files has all that it had acknowledged, although it is another process; after a kill
//! or a loss of power nobody knows. Invariant: a process is only said to continue another one whose name
//! was written down while it ran, whose log ends with that goodbye, and whose files are still there.

use std::{fs, io};

use super::{
    data::{APPEND_DIR, remove_file},
    files::NodeDir,
};
use crate::process::{last_lines, write_atomic};

/// The process that ran last: its pid and its run id.
const RAN: &str = "ran";
/// The run id of the process that the present one continues.
const CONTINUES: &str = "continues";
/// An engine says them in this order.
const SAVED: [&str; 2] = ["Calling fsync() on the AOF file", "DB saved on disk"];
const GOODBYE: &str = "is now ready to exit, bye bye";
/// Something was not written.
const FAILED: [&str; 5] = [
    "Fail to fsync",
    "Error ",
    "hort write",
    "can't exit",
    "xit anyway",
];

impl NodeDir {
    /// Writes down which process runs, for whoever starts after it; with an empty run id for one whose
    /// files lack something: its goodbye says nothing then.
    ///
    /// # Errors
    /// When the disk refuses; then nobody continues it.
    pub fn note_run(&self, pid: u32, run_id: &str) -> io::Result<()> {
        let text = format!("{pid} {run_id}");
        if fs::read_to_string(self.path().join(RAN)).is_ok_and(|before| before == text) {
            return Ok(());
        }
        write_atomic(&self.path().join(RAN), text.as_bytes(), 0o600)
    }

    /// An agent of before has noted that this process's files lack something, and no more since.
    pub fn lacked(&self, pid: u32) -> bool {
        fs::read_to_string(self.path().join(RAN)).is_ok_and(|text| text == format!("{pid} "))
    }

    /// Before a start: from now on the present process is the one that begins.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn note_rest(&self) -> io::Result<()> {
        let (ran, continues) = (self.path().join(RAN), self.path().join(CONTINUES));
        if !self.has_data() {
            remove_file(&continues)?;
            return remove_file(&ran);
        }
        let Ok(text) = fs::read_to_string(&ran) else {
            // The one before never answered, so it was given nothing: what it began with is here.
            return Ok(());
        };
        let (pid, run_id) = text.split_once(' ').unwrap_or_default();
        match ended_whole(&last_lines(&self.log()), pid) && !run_id.is_empty() {
            true => write_atomic(&continues, run_id.as_bytes(), 0o600)?,
            false => remove_file(&continues)?,
        }
        // After it: a start that is repeated comes to the same.
        remove_file(&ran)
    }

    /// Run id of the process that the present one continues; empty: none, or not known.
    pub fn continues(&self) -> String {
        fs::read_to_string(self.path().join(CONTINUES)).unwrap_or_default()
    }

    fn has_data(&self) -> bool {
        let Ok(entries) = fs::read_dir(self.path()) else {
            return false;
        };
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // Without a mark an engine starts from its append-only file, whatever else is there. An
            // empty directory of parts is no data.
            match name == APPEND_DIR {
                true => fs::read_dir(entry.path()).is_ok_and(|mut parts| parts.next().is_some()),
                false => name.ends_with(".aof"),
            }
        }) || (self.resumes() && self.snapshot().exists())
    }
}

/// Whether a log ends with this process's goodbye, after it has written everything.
fn ended_whole(log: &str, pid: &str) -> bool {
    let of = |line: &str| line.split_once(':').is_some_and(|(who, _)| who == pid);
    let lines: Vec<&str> = log.lines().filter(|l| !l.trim().is_empty()).collect();
    let Some(last) = lines.last() else {
        return false;
    };
    if pid.is_empty() || !of(last) || !last.contains(GOODBYE) {
        return false;
    }
    let said = lines.iter().filter(|line| of(line));
    let mut saved = false;
    for line in said {
        saved |= SAVED.iter().any(|words| line.contains(words));
        if FAILED.iter().any(|words| line.contains(words)) {
            return false;
        }
    }
    saved
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "\
        12:M 22 Nov 2026 11:00:59.468 # User requested shutdown...\n\
        12:M 22 Nov 2026 11:00:59.468 * Calling fsync() on the AOF file.\n\
        12:M 22 Nov 2026 11:00:59.468 * Removing the pid file.\n\
        12:M 22 Nov 2026 11:00:59.468 # Redis is now ready to exit, bye bye...\n";

    fn node() -> (tempfile::TempDir, NodeDir) {
        let home = tempfile::tempdir().unwrap();
        let dir = NodeDir::create(home.path(), "n").unwrap();
        fs::write(dir.path().join("appendonly.aof"), "data").unwrap();
        (home, dir)
    }

    #[test]
    fn only_a_goodbye_after_everything_was_written_counts() {
        assert!(ended_whole(WHOLE, "12"));
        assert!(!ended_whole(WHOLE, "1"), "another process's");
        assert!(!ended_whole("", "12"));
        let without = |words: &str| WHOLE.replace(words, "");
        assert!(!ended_whole(
            &without("Calling fsync() on the AOF file."),
            "12"
        ));
        assert!(!ended_whole(&without("bye bye"), "12"));
        let failed = WHOLE.replace("Removing", "Fail to fsync the AOF file: no space. Removing");
        assert!(!ended_whole(&failed, "12"));
        let more = format!("{WHOLE}13:M 22 Nov 2026 11:01:00.000 # Server initialized\n");
        assert!(!ended_whole(&more, "12"), "another process has run since");
    }

    #[test]
    fn who_starts_after_a_goodbye_continues_and_who_starts_after_a_kill_does_not() {
        let (_home, dir) = node();
        dir.note_run(12, "first").unwrap();
        fs::write(dir.log(), WHOLE).unwrap();
        dir.note_rest().unwrap();
        assert_eq!(dir.continues(), "first");
        dir.note_rest().unwrap();
        assert_eq!(
            dir.continues(),
            "first",
            "the one between has never answered"
        );
        dir.note_run(13, "second").unwrap();
        assert_eq!(dir.continues(), "first", "while the second runs");
        dir.note_rest().unwrap();
        assert_eq!(dir.continues(), "", "nobody knows how the second has ended");
        dir.note_run(12, "").unwrap();
        assert!(dir.lacked(12) && !dir.lacked(13));
        dir.note_rest().unwrap();
        assert_eq!(dir.continues(), "", "its file lacked something");
    }

    #[test]
    fn files_that_are_gone_are_continued_by_nobody() {
        let (_home, dir) = node();
        dir.note_run(12, "first").unwrap();
        fs::write(dir.log(), WHOLE).unwrap();
        fs::remove_file(dir.path().join("appendonly.aof")).unwrap();
        fs::write(dir.path().join("dump.rdb"), "of a trial").unwrap();
        fs::create_dir(dir.path().join("appendonlydir")).unwrap();
        dir.note_rest().unwrap();
        assert_eq!(dir.continues(), "");
    }
}
