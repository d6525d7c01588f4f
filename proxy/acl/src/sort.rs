//! SORT with BY or GET looks at keys that its arguments do not name.
//!
//! Invariant: only who may read every key gets to look at such keys.

use slotmesh_command::{Arguments, Command};

use crate::user::User;

impl User {
    /// To be asked for SORT and SORT_RO after [`Self::check`], where the command would be executed: ACL
    /// DRYRUN does not ask it and ACL LOG does not tell of it.
    ///
    /// # Errors
    /// The error reply.
    pub fn check_sort<A: Arguments + ?Sized>(
        &self,
        command: &Command,
        args: &A,
    ) -> Result<(), &'static str> {
        if self.is_unrestricted() || !matches!(command.name, "sort" | "sort_ro") {
            return Ok(());
        }
        match first_pattern(args) {
            Some(text) if !self.may_read_all_keys(command, args) => Err(text),
            _ => Ok(()),
        }
    }
}

/// The first option that names other keys, as what is said of it if it is denied. A word that is no
/// option ends the search: the engine refuses the command for it.
fn first_pattern<A: Arguments + ?Sized>(args: &A) -> Option<&'static str> {
    let mut at = 2;
    while at < args.count() {
        let is = |word: &[u8]| args.argument(at).eq_ignore_ascii_case(word);
        let value = Some(at + 1).filter(|&value| value < args.count());
        let value = value.map(|value| args.argument(value));
        at += match value {
            _ if is(b"asc") || is(b"desc") || is(b"alpha") => 1,
            Some(_) if is(b"get") => {
                return Some("ERR GET option of SORT denied due to insufficient ACL permissions.");
            }
            // Without a star it is no pattern: it says not to sort.
            Some(pattern) if is(b"by") && pattern.contains(&b'*') => {
                return Some("ERR BY option of SORT denied due to insufficient ACL permissions.");
            }
            Some(_) if is(b"by") || is(b"store") => 2,
            Some(_) if is(b"limit") => 3,
            _ => return None,
        };
    }
    None
}
