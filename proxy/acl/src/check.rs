//! Why a command is denied, and which of its arguments are channels.
//!
//! Invariant: the texts are Redis 7.0's, and name no key.

use slotmesh_command::{Arguments, Command, Flag};

/// What a user may not do. Numbers are positions among the command's arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    Command,
    Key(usize),
    Channel(usize),
}

impl Denied {
    /// The error reply.
    #[must_use]
    pub fn text(self, command: &Command) -> String {
        match self {
            Self::Command => format!(
                "NOPERM this user has no permissions to run the '{}' command",
                command.name
            ),
            Self::Key(_) => {
                "NOPERM this user has no permissions to access one of the keys used as arguments"
                    .to_owned()
            }
            Self::Channel(_) => {
                "NOPERM this user has no permissions to access one of the channels used as arguments"
                    .to_owned()
            }
        }
    }

    /// What ACL DRYRUN answers, a bulk string.
    #[must_use]
    pub fn dry_run_text<A: Arguments + ?Sized>(self, command: &Command, args: &A) -> Vec<u8> {
        let (verb, name, noun) = match self {
            Self::Command => ("run", command.name.as_bytes(), "command"),
            Self::Key(at) => ("access", args.argument(at), "key"),
            Self::Channel(at) => ("access", args.argument(at), "channel"),
        };
        let mut text = format!("This user has no permissions to {verb} the '").into_bytes();
        text.extend(name.iter().take_while(|&&byte| byte != 0));
        text.extend_from_slice(b"' ");
        text.extend_from_slice(noun.as_bytes());
        text
    }

    /// The position that the denial is about, and how much it outweighs others: of several selectors'
    /// denials the one that came furthest is told.
    pub(crate) fn weight(self) -> (u8, usize) {
        match self {
            Self::Command => (0, 0),
            Self::Key(at) => (1, at),
            Self::Channel(at) => (2, at),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChannelKind {
    /// Taking leave is always allowed.
    None,
    One,
    Many,
    Pattern,
}

pub(crate) fn channel_kind(command: &Command) -> ChannelKind {
    if !command.flags.has(Flag::PubSub) {
        return ChannelKind::None;
    }
    match command.name {
        "publish" | "spublish" => ChannelKind::One,
        "subscribe" | "ssubscribe" => ChannelKind::Many,
        "psubscribe" => ChannelKind::Pattern,
        _ => ChannelKind::None,
    }
}

/// Positions of the channels, or patterns of channels, that a command wants.
pub(crate) fn channels<A: Arguments + ?Sized>(
    command: &Command,
    args: &A,
) -> impl Iterator<Item = usize> + use<A> {
    match channel_kind(command) {
        ChannelKind::None => 1..1,
        ChannelKind::One => 1..args.count().min(2),
        ChannelKind::Many | ChannelKind::Pattern => 1..args.count(),
    }
}
