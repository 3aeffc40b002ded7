/** Starts Trino: its archives have no main class of their own. */
public final class Launch {
    public static void main(String[] arguments) {
        new io.trino.server.Server().start(arguments[0]);
    }
}
