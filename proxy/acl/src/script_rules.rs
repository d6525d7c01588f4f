//! What a user may do, said for one who checks the calls of a script elsewhere than here.
//!
//! Invariant: nothing is allowed there that [`User::check`] would deny here; a command that is not in
//! the table is not allowed at all.

use slotmesh_command::{Command, Needs, all};

use crate::user::User;

/// One selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScriptRules {
    /// Names in lower case: `get`, `object|encoding`, and `select|0` if only that first argument is
    /// allowed.
    pub commands: Vec<String>,
    /// Patterns of keys with what may be done to them; `None`: every key.
    pub keys: Option<Vec<(String, Needs)>>,
    /// Patterns of channels; `None`: every channel.
    pub channels: Option<Vec<String>>,
}

impl User {
    /// The selectors, with those commands of the table that a script can call at all.
    pub fn script_rules(&self, callable: impl Fn(&Command) -> bool) -> Vec<ScriptRules> {
        let commands: Vec<&Command> = all()
            .filter(|one| !one.has_subcommands() && callable(one))
            .collect();
        let rules = self.every_selector().map(|selector| {
            let set = &selector.commands;
            let names = commands.iter().flat_map(|command| {
                let whole = set.allow_any(command).then(|| command.name.to_owned());
                let parts = set.first_args(command).iter();
                let parts =
                    parts.map(|part| format!("{}|{}", command.name, part.to_ascii_lowercase()));
                whole.into_iter().chain(parts)
            });
            let channels = &selector.channels;
            ScriptRules {
                // A blank ends a name where they are read.
                commands: names
                    .filter(|name| !name.contains(char::is_whitespace))
                    .collect(),
                keys: selector.keys.listed(),
                channels: (!channels.all()).then(|| channels.patterns().to_vec()),
            }
        });
        rules.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_selector_says_what_it_allows() {
        let mut user = User::new("ann");
        let rules = [
            "+get",
            "+object|encoding",
            "+select|0",
            "%R~a:*",
            "&news",
            "(+set ~*)",
        ];
        user.set(&rules).unwrap();
        let said = user.script_rules(|command| command.name != "object|help");
        let [root, other] = &said[..] else {
            panic!("{said:?}");
        };
        assert_eq!(root.commands, ["get", "object|encoding", "select|0"]);
        assert_eq!(root.keys, Some(vec![("a:*".to_owned(), Needs::READ)]));
        assert_eq!(root.channels, Some(vec!["news".to_owned()]));
        assert_eq!(
            (&other.commands[..], &other.keys),
            (&["set".to_owned()][..], &None)
        );
        assert_eq!(other.channels, Some(vec![]));
        assert_eq!(
            user.script_rules(|_| false)[0].commands,
            Vec::<String>::new()
        );
    }
}
