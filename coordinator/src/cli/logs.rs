//! `everlit logs`: the raw bytes that are there, or line by line as they come.

use clap::Args;
use everlit_api::client::{Client, LogNews, LogRequest};
use everlit_api::request::LogLine;
use std::io::IsTerminal;

use super::{Fail, Output, find, out};

/// `everlit logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The job's id, the beginning or end of it, its name, or `last`
    #[arg(value_name = "JOB")]
    job: String,
    /// Go on as lines come, until the job is final
    #[arg(short, long)]
    follow: bool,
    /// Of this rank only
    #[arg(long)]
    rank: Option<u32>,
    /// Of this attempt only
    #[arg(long)]
    attempt: Option<u32>,
    /// Only the last so many lines
    #[arg(long, short = 'n', value_name = "LINES")]
    tail: Option<u64>,
}

/// Prints a log.
pub(super) async fn logs(client: &Client, args: &LogsArgs, output: Output) -> Result<(), Fail> {
    let request = LogRequest { rank: args.rank, attempt: args.attempt, tail: args.tail };
    if !args.follow {
        if output == Output::Json {
            return Err(Fail::Usage("lines as JSON come with --follow only".into()));
        }
        let id = find::job(client, &args.job).await?;
        let mut text = client.logs(id, &request, false).await?;
        while let Some(bytes) = text.chunk().await? {
            out::bytes(&bytes)?;
        }
        return Ok(());
    }
    let id = find::job(client, &args.job).await?;
    let many = args.rank.is_none() && client.job(id).await?.world_size > 1;
    let mut stream = client.follow_logs(id, &request);
    let mut printer = Printer { prefix: many, colour: std::io::stdout().is_terminal(), open: None };
    while let Some(news) = stream.next().await? {
        match news {
            LogNews::Line(line) if output == Output::Json => out::json(&line)?,
            LogNews::Line(line) => out::bytes(printer.text(&line).as_bytes())?,
            LogNews::Gap(bytes) => eprintln!("everlit: {bytes} bytes of this log are gone"),
            LogNews::Missing { node, reason } => eprintln!("everlit: the part of this log that is on node {node} is missing: {reason}"),
            LogNews::End(state) => eprintln!("everlit: the job {state}"),
        }
    }
    Ok(())
}

/// Lines with their rank in front, where there is more than one.
struct Printer {
    prefix: bool,
    colour: bool,
    /// A line that goes on: whose it is.
    open: Option<u32>,
}

impl Printer {
    fn text(&mut self, line: &LogLine) -> String {
        let goes_on = self.open == Some(line.rank);
        let mut text = if self.open.is_some() && !goes_on { "\n".into() } else { String::new() };
        if self.prefix && !goes_on {
            let colour = 31 + line.rank % 6;
            text.push_str(&if self.colour { format!("\x1b[{colour}m[{}]\x1b[0m ", line.rank) } else { format!("[{}] ", line.rank) });
        }
        text.push_str(&line.line);
        if !line.partial {
            text.push('\n');
        }
        self.open = line.partial.then_some(line.rank);
        text
    }
}

#[cfg(test)]
mod tests {
    use everlit_api::agent::log::Stream;
    use everlit_api::time::Timestamp;

    use super::*;

    #[test]
    fn parts_of_a_line_are_joined() {
        let mut printer = Printer { prefix: true, colour: false, open: None };
        let mut line = |rank, line: &str, partial| {
            printer.text(&LogLine { rank, attempt: 1, stream: Stream::Stdout, time: Timestamp(0), line: line.into(), partial })
        };
        let parts = [line(0, "a", true), line(0, "b", false), line(1, "c", true), line(0, "d", false), line(0, "e", false)];
        assert_eq!(parts.concat(), "[0] ab\n[1] c\n[0] d\n[0] e\n");
    }
}
