//! What a user must be allowed to do with each key of a command, if it may use only some keys.
//!
//! Invariant: these are the engines' own rules. A command that every engine refuses may need nothing,
//! as with them.

use crate::keys::{Arguments, Begin, KeySpec, Keys, SPECS_MAX};
use crate::lookup::Command;

/// Rights to one key. Neither of them: any right will do (EXISTS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    pub read: bool,
    pub write: bool,
}

impl Needs {
    pub const BOTH: Self = Self {
        read: true,
        write: true,
    };
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
    pub const WRITE: Self = Self {
        read: false,
        write: true,
    };
}

/// What a rule for keys says of rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rights {
    Always(Needs),
    /// SET and BITFIELD: it depends on their options.
    ByArguments,
}

impl Rights {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "r" => Self::Always(Needs::READ),
            "w" => Self::Always(Needs::WRITE),
            "rw" => Self::Always(Needs::BOTH),
            "any" => Self::Always(Needs::default()),
            "by-arguments" => Self::ByArguments,
            _ => return None,
        })
    }

    /// From the flags of a key specification, as COMMAND INFO shows them.
    pub(crate) fn of_flags(has: impl Fn(&str) -> bool) -> Self {
        if has("variable_flags") {
            return Self::ByArguments;
        }
        Self::Always(Needs {
            read: has("access"),
            write: has("insert") || has("update") || has("delete"),
        })
    }

    /// An engine that has no such flags: whoever reads needs to read, whoever does not needs both.
    pub(crate) fn of_old(read_only: bool) -> Self {
        Self::Always(if read_only { Needs::READ } else { Needs::BOTH })
    }
}

impl Command {
    /// Position of each key and what is needed for it, in the order of the engines' checks. Channels
    /// are not among them.
    pub fn needs<A: Arguments + ?Sized>(
        &self,
        args: &A,
    ) -> impl Iterator<Item = (usize, Needs)> + use<A> {
        self.runs(args)
            .into_iter()
            .flat_map(|(keys, needs)| keys.map(move |key| (key, needs)))
    }

    fn runs<A: Arguments + ?Sized>(&self, args: &A) -> [(Keys, Needs); SPECS_MAX] {
        const NONE: [(Keys, Needs); SPECS_MAX] = [(Keys::NONE, Needs::BOTH); SPECS_MAX];
        let mut runs = NONE;
        if self.name == "migrate" {
            runs[0].0 = migrate(args);
            return runs;
        }
        let specs = self.keys.iter().filter(|spec| spec.is_key());
        for (run, spec) in runs.iter_mut().zip(specs) {
            let needs = match spec.rights {
                Rights::Always(needs) => needs,
                Rights::ByArguments if self.name == "bitfield" => bitfield(args),
                Rights::ByArguments if self.name == "set" => set(args),
                Rights::ByArguments => Needs::BOTH,
            };
            let keys = Keys::find(std::slice::from_ref(spec), args).unwrap_or(Keys::NONE);
            // A rule that leads nowhere makes a command that is refused; engines look no further.
            if keys.is_empty() && spec.must_lead_somewhere() {
                return NONE;
            }
            *run = (keys, needs);
        }
        runs
    }
}

impl KeySpec {
    /// A keyword may be absent; an argument at a fixed place may not.
    fn must_lead_somewhere(&self) -> bool {
        matches!(self.begin, Begin::Index(_))
    }
}

/// MIGRATE's keys: the third argument, or if that is empty all that follow KEYS. With both it is refused.
/// Its rules for routing look for KEYS from the end, where a key may be called so.
fn migrate<A: Arguments + ?Sized>(args: &A) -> Keys {
    let is = |at: usize, word: &[u8]| args.argument(at).eq_ignore_ascii_case(word);
    let mut at = 6;
    // A KEYS that nothing follows is none.
    while at + 1 < args.count() {
        if is(at, b"keys") {
            let one = args.argument(3).is_empty();
            return if one {
                Keys::run(at + 1, args.count())
            } else {
                Keys::NONE
            };
        }
        at += match () {
            () if is(at, b"auth") => 2,
            () if is(at, b"auth2") => 3,
            () => 1,
        };
    }
    Keys::run(3, 4)
}

/// SET … GET gives the old value away.
fn set<A: Arguments + ?Sized>(args: &A) -> Needs {
    let mut options = (3..args.count()).map(|at| args.argument(at));
    if options.any(|option| option.eq_ignore_ascii_case(b"get")) {
        Needs::BOTH
    } else {
        Needs::WRITE
    }
}

/// BITFIELD with nothing but GET and OVERFLOW only reads.
fn bitfield<A: Arguments + ?Sized>(args: &A) -> Needs {
    let mut at = 2;
    while at < args.count() {
        let word = args.argument(at);
        let values = if word.eq_ignore_ascii_case(b"get") {
            2
        } else if word.eq_ignore_ascii_case(b"overflow") {
            1
        } else {
            return Needs::BOTH;
        };
        at += 1 + values;
        if at > args.count() {
            return Needs::BOTH;
        }
    }
    Needs::READ
}

#[cfg(test)]
mod tests {
    use crate::lookup::resolve;

    /// `1r 2rw`: positions and what is needed.
    fn needs(call: &str) -> String {
        let args: Vec<&str> = call.split(' ').collect();
        let command = resolve(args.as_slice()).unwrap();
        let shown = command.needs(args.as_slice()).map(|(at, needs)| {
            let read = if needs.read { "r" } else { "" };
            let write = if needs.write { "w" } else { "" };
            format!("{at}{read}{write}")
        });
        shown.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_key_takes_the_rights_that_are_used() {
        for (call, wanted) in [
            ("get k", "1r"),
            ("exists a b", "1 2"),
            ("set k v", "1w"),
            ("set k v GET", "1rw"),
            ("bitfield k get u4 0 overflow sat", "1r"),
            ("bitfield k get u4 0 set u4 0 1", "1rw"),
            ("bitfield k get u4", "1rw"),
            ("copy a b", "1r 2w"),
            ("zunionstore d 2 a b", "1w 3r 4r"),
            ("sort k get # store d", "1r 5w"),
            ("sort k store store", "1r 3w"),
            ("spublish c m", ""),
            // No engine executes it, so nothing is needed for it.
            ("zunionstore d 9 a b", ""),
        ] {
            assert_eq!(needs(call), wanted, "{call}");
        }
    }
}
