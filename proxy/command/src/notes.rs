//! What differs from one Redis, a command at a time: `notes.txt`, which docs/commands.md is made from.
//!
//! Invariant: a note names commands of the table, and no command has two notes.

/// Every command that has a note, in lower case (`config|get`), with its note.
pub fn notes() -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = include_str!("notes.txt").lines();
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.flat_map(|line| {
        // With its spaces: a subcommand is written `name|sub`.
        let (names, note) = line.split_once(" | ").unwrap_or((line, ""));
        names
            .split_ascii_whitespace()
            .map(move |name| (name, note.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_note_is_of_one_command_and_says_something() {
        let mut seen = Vec::new();
        for (name, note) in notes() {
            assert!(
                crate::all().any(|command| command.name == name),
                "no command {name}"
            );
            assert!(!note.is_empty(), "{name}: write `commands | note`");
            assert!(!seen.contains(&name), "{name} has two notes");
            assert!(
                !note.contains('|'),
                "{name}: a column of the page ends at '|'"
            );
            seen.push(name);
        }
    }
}
