//! docs/commands.md is made from the table, the classes and the notes, and never older than they are.
//!
//! `SLOTMESH_UPDATE_DOCS=1 cargo test -p slotmesh-command --test commands_md` writes it anew. What stands
//! outside the two marks is written by hand.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use slotmesh_command::{Class, Command, Gather, Merge, all, notes};

const BEGIN: &str =
    "<!-- Made from the command table; see proxy/command/tests/commands_md.rs. -->\n";
const END: &str = "<!-- End of what is made from the command table. -->\n";
const UPDATE: &str = "SLOTMESH_UPDATE_DOCS";
/// The page's lines are as long as other lines of docs.
const COLUMNS: usize = 110;

/// One chapter of the page: its heading, what holds for all of its commands, which those are.
struct Chapter {
    heading: &'static str,
    text: &'static str,
    has: fn(Class) -> bool,
}

const CHAPTERS: &[Chapter] = &[
    Chapter {
        heading: "One key",
        text: "Sent to the shard that owns the key's slot. As with one Redis.",
        has: |class| class == Class::SingleKey,
    },
    Chapter {
        heading: "Split and merged",
        text: "Keys on one shard: sent as it is. Else each shard gets its part, all at once, and the \
               replies become one. Each part is atomic, the whole is not.",
        has: |class| matches!(class, Class::SplitMerge(_)),
    },
    Chapter {
        heading: "Computed in the proxy",
        text: "Keys on one shard: sent as it is. Else the proxy reads the operands, computes, and \
               stores the result. That is not atomic over shards: what others write meanwhile may be \
               seen in one operand and not in another. Operands above the parameter \
               `job_bytes_max` are refused; a wrong result is never given.",
        has: |class| class == Class::Computed,
    },
    Chapter {
        heading: "All keys on one shard",
        text: "Sent to the shard of the keys; if they are on several, \
               `CROSSSLOT Keys in request don't hash to the same slot`. Keys that belong together share \
               a hash tag: `{user1}:a`, `{user1}:b`.",
        has: |class| class == Class::SameSlot,
    },
    Chapter {
        heading: "Every shard: numbers added",
        text: "Sent to every shard; the reply is the sum.",
        has: |class| class == Class::AllShards(Gather::Sum),
    },
    Chapter {
        heading: "Every shard: lists joined",
        text: "Sent to every shard; the reply holds the members of all replies.",
        has: |class| class == Class::AllShards(Gather::Concat),
    },
    Chapter {
        heading: "Every shard: done on each",
        text: "Sent to every shard; the first error, if there is one, is the reply.",
        has: |class| {
            matches!(
                class,
                Class::AllShards(Gather::AllOk | Gather::AnyOk | Gather::EachMin)
            )
        },
    },
    Chapter {
        heading: "From shard to shard",
        text: "One shard after the other, or one of them.",
        has: |class| class == Class::Walk,
    },
    Chapter {
        heading: "One shard by its index",
        text: "The first argument says which shard, from 0; `ERR no such db node` if there is none.",
        has: |class| class == Class::ByIndex,
    },
    Chapter {
        heading: "Pub/Sub",
        text: "As with one Redis: a message reaches every subscriber of the instance, at whichever proxy.",
        has: |class| class == Class::PubSub,
    },
    Chapter {
        heading: "Transactions",
        text: "The state of one client, kept by its proxy.",
        has: |class| class == Class::Transaction,
    },
    Chapter {
        heading: "Blocking",
        text: "On a connection of its own while it waits, so that nobody else is delayed. All keys on \
               one shard, else `CROSSSLOT`. After a switchover the call waits on, for the time it has left.",
        has: |class| class == Class::Blocking,
    },
    Chapter {
        heading: "Watching the traffic",
        text: "On a connection of its own to every shard.",
        has: |class| class == Class::Monitor,
    },
    Chapter {
        heading: "The proxy itself",
        text: "Answered by the proxy, out of what it knows of the client and of the instance.",
        has: |class| class == Class::Proxy,
    },
    Chapter {
        heading: "Any shard",
        text: "No keys. Sent to one shard, which can answer for all, unless it says otherwise below; for \
               some of them an account needs the right to call them.",
        has: |class| class == Class::Keyless,
    },
];

/// `CONFIG GET` for `config|get`.
fn shown(name: &str) -> String {
    format!("`{}`", name.replace('|', " ").to_uppercase())
}

/// A command that cannot be called without a subcommand is only the name of those.
fn is_callable(command: &&Command) -> bool {
    !command.has_subcommands() || command.arity == -1
}

fn chapter(chapter: &Chapter, notes: &BTreeMap<&str, &str>) -> String {
    let commands = all()
        .filter(is_callable)
        .filter(|command| (chapter.has)(command.class));
    let (noted, plain): (Vec<_>, Vec<_>) =
        commands.partition(|command| notes.contains_key(command.name));
    assert!(
        !noted.is_empty() || !plain.is_empty(),
        "{} is empty",
        chapter.heading
    );
    let mut text = format!("### {}\n\n", chapter.heading);
    text.push_str(&wrapped(
        chapter.text.split_ascii_whitespace().map(str::to_owned),
    ));
    if !plain.is_empty() {
        text.push('\n');
        text.push_str(&wrapped(
            plain.iter().map(|command| unbreakable(command.name)),
        ));
    }
    text.push('\n');
    if !noted.is_empty() {
        text.push_str(&table(&noted, notes));
        text.push('\n');
    }
    text.replace('\u{a0}', " ")
}

/// Commands of one note share a row.
fn table(commands: &[&Command], notes: &BTreeMap<&str, &str>) -> String {
    let mut rows: Vec<(Vec<String>, &str)> = Vec::new();
    for command in commands {
        let note = notes[command.name];
        match rows.iter_mut().find(|(_, other)| *other == note) {
            Some((names, _)) => names.push(shown(command.name)),
            None => rows.push((vec![shown(command.name)], note)),
        }
    }
    let mut text = String::from("| command | what differs |\n|---|---|\n");
    for (names, note) in rows {
        writeln!(text, "| {} | {note} |", names.join(" ")).unwrap();
    }
    text
}

fn refused() -> String {
    let mut text = String::from(
        "### Not for clients\n\nNever sent; the error says what to use instead.\n\n\
         | command | instead |\n|---|---|\n",
    );
    let mut rows: Vec<(&str, Vec<String>)> = Vec::new();
    for command in all().filter(is_callable) {
        let Class::Refused(reason) = command.class else {
            continue;
        };
        match rows.iter_mut().find(|(other, _)| *other == reason) {
            Some((_, names)) => names.push(shown(command.name)),
            None => rows.push((reason, vec![shown(command.name)])),
        }
    }
    for (reason, names) in rows {
        writeln!(text, "| {} | {reason} |", names.join(" ")).unwrap();
    }
    text + "\n"
}

fn unbreakable(name: &str) -> String {
    shown(name).replace(' ', "\u{a0}")
}

fn wrapped(words: impl Iterator<Item = String>) -> String {
    let (mut text, mut line) = (String::new(), String::new());
    for word in words {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            text.push_str(&std::mem::take(&mut line));
            text.push('\n');
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&word);
    }
    text + &line + "\n"
}

fn generated() -> String {
    let notes: BTreeMap<_, _> = notes().collect();
    let chapters: String = CHAPTERS.iter().map(|one| chapter(one, &notes)).collect();
    format!("{BEGIN}\n{chapters}{}{END}", refused())
}

fn page() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    root.unwrap().join("docs").join("commands.md")
}

#[test]
fn the_page_says_what_the_table_says() {
    let text = std::fs::read_to_string(page()).unwrap();
    let (head, rest) = text.split_once(BEGIN).expect("the page has the first mark");
    let (_, tail) = rest.split_once(END).expect("the page has the second mark");
    let expected = [head, &generated(), tail].concat();
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(page(), &expected).unwrap();
    } else if text != expected {
        let line = text
            .lines()
            .zip(expected.lines())
            .find(|(old, new)| old != new);
        panic!(
            "docs/commands.md is stale: {line:?}\n\
             {UPDATE}=1 cargo test -p slotmesh-command --test commands_md"
        );
    }
}

#[test]
fn every_command_is_in_exactly_one_chapter() {
    for command in all() {
        let chapters = CHAPTERS
            .iter()
            .filter(|chapter| (chapter.has)(command.class));
        let refused = matches!(command.class, Class::Refused(_));
        assert_eq!(
            chapters.count() + usize::from(refused),
            1,
            "{}",
            command.name
        );
    }
    let text = generated();
    for command in all().filter(is_callable) {
        let name = shown(command.name);
        assert!(text.contains(&name), "{name} is not on the page");
    }
    // A chapter for each way of merging would say nothing: they are told apart by their notes.
    for merge in [Merge::Mget, Merge::Mset, Merge::Sum] {
        assert!(
            CHAPTERS
                .iter()
                .any(|chapter| (chapter.has)(Class::SplitMerge(merge)))
        );
    }
}
